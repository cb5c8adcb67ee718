"""`shardwise tokens`: text as token ids in a folder, written once and read by every verb."""

from dataclasses import dataclass

from shardwise.cli.asked import Call, Command, command
from shardwise.cli.progress import ProgressLine
from shardwise.core.errors import OptionError
from shardwise.verbs.tokens import WHAT, TokensOptions, check_tokens
from shardwise.verbs.tokens import tokens as write


@dataclass(frozen=True, slots=True)
class _Asked(TokensOptions):
    pass


@command(
    Command(
        _Asked,
        shared=("tokenizer", "text_key", "end_token"),
        about={"tokenizer": "Your tokenizer.json; or give --vocab-size, and one is trained on the text."},
        panels=dict.fromkeys(("tokenizer", "text_key", "end_token"), WHAT),
        out="The folder to write; it must not be there yet.",
        check_out=lambda out, values: None,  # the verb looks, before it reads
    )
)
def tokens(call: Call[_Asked]) -> int:
    """Write text as token ids once, into a folder that every verb reads: --text FOLDER.

    Documents are read, encoded and written one at a time, whatever their number; the folder is there
    whole or not at all. --check reads a folder whole and holds it against its manifest.

    [dim]shardwise tokens books/ --tokenizer tokenizer.json --out books.tokens[/]
    [dim]shardwise tokens part-*.parquet --text-key body --vocab-size 32000 --out mine.tokens[/]
    [dim]shardwise tokens --check books.tokens[/]
    """
    folder = call.output.out
    if call.own.check is not None:
        if folder is not None:
            raise OptionError("--check writes nothing. Leave out --out.")
        with ProgressLine() as progress:
            done = check_tokens(call.own.check, progress)
    elif folder is None:
        raise OptionError("--out is missing. Name the folder to write, or a folder to read with --check.")
    else:
        with ProgressLine() as progress:
            done = write(folder, call.case.text, call.own, progress)
    call.output.show(done)
    return 1 if done.problems else 0
