"""`shardwise case`: writes a case file."""

from shardwise.cli.asked import ALL, Call, Command, NoOptions, Shown, command
from shardwise.core.option import Asked, options_of
from shardwise.report.common.streams import write_out


@command(
    Command(
        shared=ALL,
        defaults={"model": Shown("the verb's own"), "mesh": Shown("the verb's own")},
        has_json=False,
    )
)
def case(call: Call[NoOptions]) -> int:
    """Write a case file: what all verbs share, with a table for what only one of them knows; comments say
    what each key is.

    Every verb takes it by --config. What isn't given here is in the file too, commented out.

    [dim]shardwise case rowwise colwise --model llama3-8b --mesh tp=8 --seq 4096 > mine.toml[/]
    [dim]shardwise compare --config mine.toml[/]
    """
    from shardwise.cli.main import verbs
    from shardwise.files.case import case_text

    keys: dict[str, tuple[Asked, ...]] = {name: options_of(what.options) for name, what in verbs().items()}
    tables = {
        name: tuple(
            each for each in own if not (each.option.is_argument or each.option.is_hidden or each.key in ALL)
        )
        for name, own in keys.items()
    }
    own = {name: asked for name, asked in tables.items() if asked}
    write_out(case_text(call.case, call.given, own).encode())
    return 0
