"""Options that a fit shares with the commands on finished runs: each once. Nothing here loads torch."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, TypeVar

from ranksure.choices import LossOn, Weighting
from ranksure.errors import SettingError
from ranksure.options import COMMON, DATA, MODEL, SEED, SOLVER, Option, Settings, whole
from ranksure.tasks.options import TASKS, RowOptions, loss_option

if TYPE_CHECKING:
    from ranksure.data.samples import Samples

Rows = TypeVar("Rows", bound="Samples")

LOSS_ON = Option("completion (as without it), or all tokens: prompts too.", DATA)
WEIGHTING = Option("Mean over every token alike (as without it), or every sample alike (causal models).", SOLVER)


def share(value: float) -> str | None:
    """In (0, 1)."""
    return None if 0 < value < 1 else "is a share: use a number in (0, 1)"


@dataclass(frozen=True, kw_only=True)
class ConversationOptions(Settings):
    """How the data of a causal language model is read."""

    prompt_column: Annotated[str, Option("Column of prompts.", DATA)] = "prompt"
    completion_column: Annotated[str, Option("Column of completions.", DATA)] = "completion"
    messages_column: Annotated[str, Option("Column of conversations.", DATA)] = "messages"
    loss_on: Annotated[LossOn | None, LOSS_ON] = None
    packing: Annotated[bool, Option("Pack short rows into long sequences that are kept apart.", DATA)] = False


@dataclass(frozen=True, kw_only=True)
class DataSettings(ConversationOptions, RowOptions):
    """How a run's data is read.

    ``samples`` rows are chosen by ``seed``. ``by_length`` puts rows of like length together in batches, which pads
    less; else they are in the data's order. What is None is as the adapter's own record says (``task.json``).
    """

    loss: Annotated[str | None, loss_option("as the run was trained")] = None
    weighting: Annotated[Weighting | None, WEIGHTING] = None

    max_length: Annotated[
        int | None, Option("Tokens per row (default: the model's limit, at most 256; 1,024 for causal models).", DATA)
    ] = None
    batch_size: Annotated[
        int | None, Option("Rows per batch (default: 32; 4 for causal models).", DATA, check=whole(1))
    ] = None
    by_length: bool = False
    samples: Annotated[
        int | None, Option("Look at so many rows only: figures without a verdict.", DATA, check=whole(1))
    ] = None
    seed: Annotated[int, Option("Seed of the choice of rows.", DATA, check=SEED)] = 0

    def few(self, rows: Rows) -> Rows:
        """The rows that are asked for, chosen by the seed."""
        if self.samples is None or self.samples >= len(rows):
            return rows
        return rows.shuffled(self.seed).subset(range(self.samples))

    def refuse_packing(self, instead: str) -> None:
        """Refuse what only causal language models have.

        Raises:
            SettingError: says what this is ``instead``.
        """
        if self.packing or self.loss_on == "all":
            raise SettingError(f"`packing` and `loss_on` are for causal language models; {instead}")


@dataclass(frozen=True, kw_only=True)
class PlaceOptions(Settings):
    """Where a finished run's parts are, and how they are loaded."""

    base: Annotated[str | None, Option("Base model (default: the one that the adapter records).", COMMON)] = None
    adapter: Annotated[str | None, Option("Which adapter of a folder with several.", MODEL)] = None
    task: Annotated[
        str | None,
        Option(
            "SEQ_CLS, CAUSAL_LM, prompt, image or speech, where the adapter does not say.",
            MODEL,
            words=("SEQ_CLS", "CAUSAL_LM", *TASKS),
        ),
    ] = None
    device: Annotated[str, Option("auto, cpu, cuda.", MODEL)] = "auto"
    dtype: Annotated[str, Option("Base model: auto, float32, bfloat16, float16.", MODEL)] = "auto"
    revision: Annotated[str | None, Option("Hub revision of the base model.", MODEL)] = None
    trust_remote_code: Annotated[bool, Option("Run code from the model repository.", MODEL)] = False


@dataclass(frozen=True, kw_only=True)
class CertificateOptions(Settings):
    """How a run is certified."""

    tolerance: Annotated[
        float, Option("Share of the objective below which a possible gain counts as none.", SOLVER, check=share)
    ] = 0.05
    memory: Annotated[
        float | str,
        Option("Most memory for gradients; more passes are made instead.", SOLVER, parse=str, decides=False),
    ] = "8GB"

    def __post_init__(self) -> None:
        super().__post_init__()
        if getattr(self, "packing", False) and getattr(self, "weighting", None) == "sample":
            raise SettingError("`packing` joins rows, which `weighting` sample counts: leave one out")
        if getattr(self, "lam", None) is not None and getattr(self, "weight_decay", None) is not None:
            raise SettingError("give `lam` or `weight_decay`, not both")
