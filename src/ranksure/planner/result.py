"""The answer of a plan: numbers, sentences, a ``LoraConfig``, and the files on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from msgspec.structs import replace
from peft import LoraConfig

from ranksure.adapters.config import axolotl_yaml, config_snippet, lora_config
from ranksure.adapters.export import export_adapter, export_mean_pooled
from ranksure.adapters.export_merged import export_merged
from ranksure.errors import AdapterError, SettingError, one_line
from ranksure.factors import Factors
from ranksure.files import is_left, staged_folder
from ranksure.options import spoken
from ranksure.planner import answer
from ranksure.planner.solved import SOLVED, write_solved
from ranksure.records.plan import Generalization, Plan
from ranksure.records.record import encoded, plain
from ranksure.records.task import task_record, write_task
from ranksure.tasks.text import MeanPooled
from ranksure.theory.generalization import GeneralizationBound

if TYPE_CHECKING:
    from ranksure.planner.prepare import Prepared

_OWN = {"plan.json", SOLVED, "report.html", "lora_config.py", "axolotl.yaml", "adapter", "merged", "weak-decay"}
_OWN_ADAPTER = {"task.json", "adapter_config.json", "adapter_model.safetensors", "README.md", "head.safetensors"}


def check_replaceable(folder: str | os.PathLike[str]) -> None:
    """Refuse to replace a folder that holds anything but an earlier plan.

    Raises:
        SettingError: names the first thing in it that no plan wrote.
    """
    out = Path(folder)
    if out.exists() and not out.is_dir():
        raise SettingError(f"`out` {out} is a file; name a folder")
    found = sorted(entry.name for entry in out.iterdir() if not is_left(entry.name)) if out.is_dir() else []
    if not found:
        return
    foreign = [name for name in found if name not in _OWN]
    foreign += [f"adapter/{p.name}" for p in (out / "adapter").glob("*") if p.name not in _OWN_ADAPTER]
    if not foreign and not _is_plan(out / "plan.json"):
        foreign = found
    if foreign:
        raise SettingError(
            f"`out` {out} is not empty and holds {foreign[0]}, which no plan wrote; "
            "name a new folder, or empty this one"
        )
    if (out / "weak-decay").exists():
        check_replaceable(out / "weak-decay")


def _is_plan(path: Path) -> bool:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and "schema" in content and "recommended" in content


def generalization_record(bound: GeneralizationBound, used: float, lambda_max: float) -> Generalization:
    """The bound, and the lambda that its form ``theorem`` prescribes beside the one that was used."""
    content = bound.to_json()
    del content["block_weights"]  # a plan has one lambda
    prescribed = bound.theorem.prescribed
    return Generalization(
        **content,
        prescribed_weight_decay=prescribed,
        prescribed_over_used=prescribed / used,
        prescribed_over_lambda_max=prescribed / lambda_max if lambda_max > 0 else None,
    )


class PlanResult:
    """What a plan found.

    Attributes:
        record: the content of ``plan.json``.
        factors: the answer, ``(u, v)`` by module, at scale one: the certified point of the network itself, or the
            linearised network's optimum where only that was solved; ``linear_factors`` is this one in any case.
    """

    def __init__(self, record: Plan, factors: Factors, prepared: Prepared, linear: Factors | None = None) -> None:
        self.record, self.factors, self._prepared = record, factors, prepared
        self.linear_factors = factors if linear is None else linear

    @property
    def data(self) -> dict[str, Any]:
        """The record as dicts and lists."""
        return plain(self.record)

    @property
    def is_zero(self) -> bool:
        """Whether the answer is no update at all (as for lambda at or above lambda_max)."""
        return not any(u.shape[1] for u, _ in self.factors.values())

    @property
    def lora_config(self) -> LoraConfig:
        """The smallest uniform rank found, on every target module, ready for ``peft.get_peft_model``.

        Raises:
            AdapterError: the optimum is zero, so there is nothing to train.
        """
        return self._config(self.record.recommended.rank_pattern)

    @property
    def pattern_lora_config(self) -> LoraConfig:
        """The smallest rank pattern found, on the network itself where that was solved; it may leave targets out.

        For the linearised network, a trained one often reaches less with it (docs/does-the-advice-transfer.md).

        Raises:
            AdapterError: the optimum is zero, so there is nothing to train.
        """
        network = self.record.network
        return self._config(self.record.recommended.linear_pattern if network is None else network.pattern)

    def _config(self, ranks: dict[str, int]) -> LoraConfig:
        task = self._prepared.task
        return lora_config(
            ranks,
            model=None if self._prepared.settings.merged else task.adapted,
            task_type=task.peft_task_type,
            modules_to_save=task.saved_modules,
            uniform=len(set(ranks.values())) == 1,
        )

    @property
    def warnings(self) -> list[str]:
        """What a user should know before trusting the advice."""
        return answer.warnings(self.record)

    def sentences(self) -> list[str]:
        """The answer in a few plain sentences."""
        return answer.sentences(self.record)

    def snippet(self) -> str:
        """Python source of the recommended configuration."""
        return config_snippet(self.lora_config)

    def __str__(self) -> str:
        return "\n".join([*self.sentences(), *self.warnings])

    def to_json(self) -> str:
        """``plan.json`` as text; infinite values become null."""
        warnings, notes = self.warnings, self.record.notes
        if self.record.command is not None:  # whose reader knows options, not arguments
            warnings, notes = list(map(spoken, warnings)), list(map(spoken, notes))
        record = replace(self.record, sentences=self.sentences(), warnings=warnings, notes=notes)
        return encoded(record, indent=2).decode()

    def save(self, folder: str | os.PathLike[str]) -> Path:
        """Write ``plan.json``, the configuration and the solved update; the folder appears whole or not at all.

        An earlier plan in the folder is replaced; a folder that holds anything else is refused. Where the export alone
        fails, the folder holds ``plan.json`` and the optimum, with which the export can be repeated.

        Raises:
            SettingError: the folder holds something that no plan wrote.
            AdapterError: the folder holds something else or cannot be written, or the adapter does not
                load back as written.
        """
        out = Path(folder)
        check_replaceable(out)
        failure: Exception | None = None
        with staged_folder(out, "plan.json") as stage:
            (stage / "plan.json").write_text(self.to_json(), encoding="utf-8")
            if not self.is_zero:
                write_solved(stage, self.factors, self.linear_factors, self._prepared.task)
                failure = self._try_export(stage, out)
        if failure is not None:
            raise AdapterError(
                f"the plan is solved and kept in {out}, but its update could not be written: {one_line(failure)}; ask "
                "the same again, with `merged` if you like, and only that is repeated"
            ) from failure
        return out

    def _try_export(self, stage: Path, out: Path) -> Exception | None:
        """Write the configuration and the update in place of the bare optimum, or return why that stays."""
        try:
            (stage / "lora_config.py").write_text(self._notes() + self.snippet(), encoding="utf-8")
            (stage / "axolotl.yaml").write_text(self._axolotl(), encoding="utf-8")
            self._export(stage, out)
        except Exception as error:  # PEFT, transformers and the disk have their own: nothing solved is lost to one
            for name in ("adapter", "merged"):
                shutil.rmtree(stage / name, ignore_errors=True)
            return error
        (stage / SOLVED).unlink()
        return None

    @property
    def _weight_decay(self) -> float:
        return self.record.recommended.weight_decay or self.record.weight_decay

    def _notes(self) -> str:
        """Comments above the configuration: what it is for, and what it does not say."""
        task = self._prepared.task
        owner = f"{type(task.adapted).__name__}{', with a head of its own' if task.pooling == 'mean' else ''}"
        lines = [
            f"The smallest uniform rank found, in every target; module names are those of {owner}.",
            f"Weight decay {self._weight_decay:.6g}: L2 on the LoRA factors, as SGD applies it, not AdamW.",
        ]
        if task.saved_modules:
            lines.append("Made for its own fitted head, frozen: ranksure.install_planned_head(peft_model, PLAN).")
        if task.label_names:
            lines.append(f"Labels by id: {dict(enumerate(task.label_names))}; num_labels={task.n_outputs}.")
        loss = self._prepared.loss
        if loss.term == "output":
            lines.append(f"Loss: {loss.name}; in transformers problem_type={loss.problem_type!r}, labels as floats.")
        return "".join(f"# {line}\n" for line in lines)

    def _axolotl(self) -> str:
        task, advice = self._prepared.task, self.record.recommended
        return axolotl_yaml(
            advice.rank_pattern,
            weight_decay=self._weight_decay,
            modules_to_save=task.saved_modules,
            model=None if self._prepared.settings.merged else task.adapted,
        )

    def _usage(self) -> str:
        """How inputs reach the model, for the adapter's README."""
        task = self._prepared.task
        lines = [task.usage()]
        if task.label_names:
            lines.append(f"Labels by id: `{dict(enumerate(task.label_names))}`.")
        lines.append("Paths are as they were given; run the code from the same folder, or make them absolute.")
        return "\n\n".join(lines)

    def _export(self, stage: Path, out: Path) -> None:
        task, options = self._prepared.task, self._prepared.settings
        named = task.label_names if task.head and task.n_outputs > 1 else None
        id2label = dict(enumerate(named)) if named else None
        if options.merged:
            export_merged(
                task.adapted,
                self.factors,
                stage / "merged",
                tokenizer=task.processor,
                id2label=id2label,
                shown_path=out / "merged",
            )
            return
        common = {
            "base_model_name_or_path": task.name,
            "revision": task.revision,
            "id2label": id2label,
            "uniform": options.uniform,
            "shown_path": out / "adapter",
            "extra_readme": self._usage(),
        }
        if isinstance(task.model, MeanPooled):
            head = task.model.head
            export_mean_pooled(task.adapted, self.factors, head.weight, head.bias, stage / "adapter", **common)
        else:
            export_adapter(
                task.adapted,
                self.factors,
                stage / "adapter",
                head=task.saved_modules,
                num_labels=task.n_outputs if task.head else None,
                task_type=task.peft_task_type,
                **common,
            )
        write_task(stage / "adapter", task_record(task, self._prepared.loss.name))
