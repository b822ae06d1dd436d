"""click commands made from settings dataclasses: the only module that knows how an option becomes click's."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import click
from click.core import ParameterSource
from click.shell_completion import CompletionItem

from ranksure.errors import SettingError
from ranksure.options import GROUPS, OUTPUT, Option, Stated, options_of, plain, spoken

CONTEXT = {"max_content_width": 120}
_COLUMN = 30

Json = Annotated[bool, Option("The result as JSON on standard output, all else on standard error.", OUTPUT)]


def command(settings: type, *examples: str) -> Callable[[Callable[[Any], None]], SettingsCommand]:
    """A decorator: the command of a function that takes the settings; its docstring is the help."""
    return lambda work: SettingsCommand(work.__name__, settings, work, examples)


def hold(out: Path) -> None:
    """Until the command ends, no other process writes this folder; what a killed run left of it is put right.

    Raises:
        SettingError: another one does, or it cannot be written.
    """
    from ranksure.files import writing

    click.get_current_context().with_resource(writing(out))


class SettingsCommand(click.Command):
    """A command whose options are a settings dataclass's fields; calls ``work`` with the settings."""

    def __init__(self, name: str, settings: type, work: Callable[[Any], None], examples: Sequence[str]) -> None:
        self.settings, self.work, self.examples = settings, work, tuple(examples)
        super().__init__(
            name,
            callback=self._called,
            help=inspect.getdoc(work),
            short_help=(work.__doc__ or "").partition("\n")[0],
            params=[*map(_parameter, options_of(settings)), *file_options()],
            context_settings=dict(CONTEXT),
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            for stated in options_of(self.settings):
                if error.option_name.removeprefix("--").replace("-", "_") in stated.option.was:
                    raise click.UsageError(f"{error.option_name} is now {stated.flag}", ctx) from None
            raise

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        stated = options_of(self.settings)
        named = [f"{o.flag} {o.word.upper()}" for o in stated if o.required and not o.option.positional]
        return [*(placeholder(o) for o in stated if o.option.positional), *named, "[OPTIONS]"]

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        rows: dict[str, list[tuple[str, str]]] = {group: [] for group in GROUPS}
        for stated in sorted(options_of(self.settings), key=lambda stated: not stated.option.positional):
            rows[stated.option.group].append((_shown(stated), _meaning(stated)))
        for param in [*file_options(), self.get_help_option(ctx)]:
            if isinstance(param, click.Option):
                name = ", ".join(param.opts) + (f" {param.metavar}" if param.metavar else "")
                rows[OUTPUT].append((name, param.help or ""))
        for group, entries in rows.items():
            if entries:
                with formatter.section(group):  # padded, so that all groups share one column
                    formatter.write_dl([(f"{name:{_COLUMN}}", text) for name, text in entries], col_max=_COLUMN)

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Examples"):
            for line in self.examples:
                formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def _called(self, config: str | None = None, print_config: bool = False, **values: Any) -> None:
        ctx = click.get_current_context()
        given = {
            name: value
            for name, value in values.items()
            if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT and value is not None and value != ()
        }
        if print_config:
            click.echo(as_yaml(self.settings, given), nl=False)
            return
        if missing := [o.flag for o in options_of(self.settings) if o.required and o.name not in given]:
            raise click.UsageError(f"{' and '.join(missing)} must be given", ctx)
        self.work(self.settings(**given))


class LazyCommands(click.Group):
    """A group whose commands are imported when they are asked for: name to ``module:attribute``."""

    def __init__(self, *args: Any, lazy: Mapping[str, str], **more: Any) -> None:
        super().__init__(*args, **more)
        self.lazy = lazy

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.lazy)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.lazy:
            return None
        module, _, attribute = self.lazy[cmd_name].partition(":")
        return getattr(import_module(module), attribute)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args[0] not in self.lazy and not args[0].startswith("-"):
            raise click.UsageError(f"no such command {args[0]!r}{did_you_mean(args[0], self.lazy)}", ctx)
        return super().resolve_command(ctx, args)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The nearest word that is known, as the end of a sentence; empty if none is near."""
    near = get_close_matches(word, list(known), 1)
    return f"; did you mean {near[0]}?" if near else ""


def usage_mistake(error: click.UsageError) -> str:
    """What is wrong with how a command was called, in one line, and where its help is."""
    message = error.format_message().rstrip(".")
    if isinstance(error, click.NoSuchOption):
        near = f"; did you mean {error.possibilities[0]}?" if error.possibilities else ""
        message = f"no such option {error.option_name}{near}"
    elif message[1:2].islower():
        message = message[:1].lower() + message[1:]
    return f"{message} (see {error.ctx.command_path if error.ctx else 'ranksure'} --help)"


def as_yaml(settings: type, given: Mapping[str, Any]) -> str:
    """A file of options that ``--config`` reads: every option by group, those at their default as comments."""
    import yaml

    lines: list[str] = []
    for group in GROUPS:
        members = [o for o in options_of(settings) if o.option.group == group]
        lines += [f"# {group}"] if members else []
        for stated in members:
            value = given.get(stated.name, None if stated.required else stated.default)
            text = yaml.safe_dump(plain(value), default_flow_style=True, width=10**6, allow_unicode=True)
            text = text.removesuffix("...\n").strip()  # the mark of a document's end, after a lone word or number
            mark = "" if stated.name in given else "# "
            lines.append(f"{mark}{stated.key}: {text}  # {spoken(stated.option.help)}")
        lines += [""] if members else []
    return "\n".join(lines)


class _Value(click.ParamType):
    """A value as the settings dataclass declares it."""

    def __init__(self, stated: Stated) -> None:
        self.stated, self.name = stated, stated.word

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if isinstance(value, list):  # of a file of options
            return value
        try:
            return self.stated.read(str(value))
        except ValueError as error:
            raise SettingError(f"{self.stated.flag} {value!r} {error}") from None

    def shell_complete(self, ctx: click.Context, param: click.Parameter, incomplete: str) -> list[CompletionItem]:
        if "path" in self.name:
            return [CompletionItem(incomplete, type="file")]
        return [CompletionItem(word) for word in self.stated.choices if word.startswith(incomplete)]


def _parameter(stated: Stated) -> click.Parameter:
    if stated.option.positional:
        count = -1 if stated.many else 1
        return click.Argument(
            [stated.name], type=_Value(stated) if count == 1 else str, nargs=count, required=False, metavar=stated.flag
        )
    if stated.is_flag:
        return click.Option([stated.name, f"{stated.flag}/--no-{stated.flag[2:]}"], is_flag=True, default=None)
    return click.Option([stated.name, stated.flag], type=_Value(stated))


def file_options() -> list[click.Option]:
    """What every command has beside its settings."""
    return [
        click.Option(
            ["--config"],
            metavar="FILE.yaml",
            type=click.Path(dir_okay=False),
            is_eager=True,
            callback=_read_config,
            help="Options from a file; those on the command line win, and --no-NAME takes a flag back.",
        ),
        click.Option(["--print-config"], is_flag=True, help="Print the options as such a file, and stop."),
    ]


def _read_config(ctx: click.Context, _: click.Parameter, path: str | None) -> str | None:
    if path is None or ctx.resilient_parsing:
        return path
    import yaml

    assert isinstance(ctx.command, SettingsCommand)
    try:
        with open(path, encoding="utf-8") as file:
            content = yaml.safe_load(file) or {}
    except OSError as error:
        raise SettingError(f"--config {path} cannot be read: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        where = getattr(error, "problem_mark", None)
        raise SettingError(f"--config {path} is no YAML{f' (line {where.line + 1})' if where else ''}") from None
    if not isinstance(content, dict):
        raise SettingError(f"--config {path} must hold names and values, such as: rank: 4")
    ctx.default_map = dict(_settled(path, content, ctx.command.settings))
    return path


def _settled(path: str, content: dict[Any, Any], settings: type) -> Iterator[tuple[str, Any]]:
    known = {key: stated for stated in options_of(settings) for key in (stated.key, stated.name)}
    old = {name: stated for stated in options_of(settings) for name in stated.option.was}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name in old:
            raise SettingError(f"--config {path}: {key} is now {old[name].key}")
        stated = known.get(name)
        if stated is None:
            raise SettingError(f"--config {path} has an unknown option {key!r}{did_you_mean(str(key), known)}")
        if value is None:
            continue
        is_list = isinstance(value, list)
        if isinstance(value, dict) or (isinstance(value, bool) != stated.is_flag) or (is_list and not stated.many):
            raise SettingError(f"--config {path}: {stated.key}: {value!r} is not {stated.word or 'true or false'}")
        yield stated.name, value


def placeholder(stated: Stated) -> str:
    """An argument without a name in the line of how to call a command."""
    name = f"{stated.flag}..." if stated.many else stated.flag
    return name if stated.required else f"[{name}]"


def _shown(stated: Stated) -> str:
    if stated.option.positional:
        return stated.flag
    if stated.is_flag:
        return f"{stated.flag} / --no-{stated.flag[2:]}" if stated.default is True else stated.flag
    return f"{stated.flag} {stated.word}"


def _meaning(stated: Stated) -> str:
    text = spoken(stated.option.help)
    if stated.required:
        return f"{text} [required]"
    if stated.default in (None, "", ()) or isinstance(stated.default, bool):
        return text
    return f"{text} [default: {default_of(stated)}]"


def default_of(stated: Stated) -> str:
    """The default as one would write it."""
    if isinstance(stated.default, tuple):
        return ",".join(map(str, stated.default))
    return f"{stated.default:g}" if isinstance(stated.default, float) else str(stated.default)
