"""tokens: text -> a folder of token ids, written once; and a folder -> whether it is whole."""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from shardwise.core.case import TextSource
from shardwise.core.errors import OptionError
from shardwise.core.measurement import TextSummary
from shardwise.core.option import Option, check_options
from shardwise.core.token_folder import TokenFolder
from shardwise.verbs.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from shardwise.text.manifest import Manifest
    from shardwise.text.writing import Written

WHAT = "What is written"
_EVERY_S = 2.0


@dataclass(frozen=True, slots=True)
class TokensOptions:
    """What only tokens knows."""

    files: Annotated[
        tuple[str, ...],
        Option(
            "Your text, .jsonl or .parquet files, or folders; by default Python's own documentation.",
            is_argument=True,
        ),
    ] = ()
    vocab_size: Annotated[
        int | None,
        Option("Ids of a tokenizer that is trained on the text, where no --tokenizer is given.", WHAT, 256),
    ] = None
    shard_tokens: Annotated[int, Option("Tokens in a shard, a file of its own.", WHAT, 1)] = 1 << 27
    check: Annotated[
        Path | None,
        Option(
            "Writes nothing: reads this folder whole, and holds it against its manifest.", WHAT, shown="none"
        ),
    ] = None

    def __post_init__(self) -> None:
        check_options(self)
        if self.check is not None and self.files:
            raise OptionError("--check reads a folder that is written. Leave out the files.")


def tokens(
    out: Path, text: TextSource, options: TokensOptions | None = None, progress: Progress = silent
) -> TokenFolder:
    """Writes the folder `out`, a document at a time: whole or not at all. text: its tokenizer, text_key
    and end_token; the files are the options'. Raises InputError for what can't be used, and where `out`
    is there; RunError where the disk is full."""
    from shardwise.text.documents import shown
    from shardwise.text.writing import check_new, write_folder

    options = options or TokensOptions()
    if (text.tokenizer is None) == (options.vocab_size is None):
        raise OptionError(
            "tokens takes one of --tokenizer FILE, the model's own, and --vocab-size N, with which one is "
            "trained on the text. Give one."
        )
    check_new(out)
    what, ids = _encoded(text, options, progress)
    manifest = write_folder(out, _told(ids, progress), what, options.shard_tokens)
    return _noun(shown(out), manifest)


def check_tokens(folder: Path, progress: Progress = silent) -> TokenFolder:
    """Reads every byte of a folder. Raises TextError where it isn't whole by its sizes; other problems
    are in the answer."""
    from shardwise.text.checking import problems_of
    from shardwise.text.documents import shown
    from shardwise.text.shards import Shards
    from shardwise.text.stream import LARGEST_VOCAB

    shards = Shards(folder, LARGEST_VOCAB)
    problems = tuple(problems_of(shards, progress))
    return _noun(shown(folder), shards.manifest, checked=True, problems=problems)


def _encoded(
    text: TextSource, options: TokensOptions, progress: Progress
) -> "tuple[Written, Iterator[NDArray[np.int32]]]":
    """What is written, and each document's ids, made as they are asked for. Where a tokenizer is trained,
    the files are read twice."""
    from shardwise.text import tokenizer as bpe
    from shardwise.text.corpus import STDLIB_SOURCE, load_text
    from shardwise.text.documents import documents_of, names_of, shown
    from shardwise.text.ends import Ending, encode_documents
    from shardwise.text.writing import Written

    files = [Path(name) for name in options.files]
    own = () if files else load_text().documents
    source = names_of(files) if files else STDLIB_SOURCE

    def documents() -> Iterator[str]:
        return documents_of(files, text.text_key) if files else iter(own)

    if text.tokenizer is not None:
        file = Path(text.tokenizer)
        definition, name = bpe.read_file(file), shown(file)
        tokenizer = bpe.parse(definition, name)
    else:
        assert options.vocab_size is not None
        progress(f"training a tokenizer of {options.vocab_size} ids on {source}")
        file, tokenizer = None, bpe.train(documents(), options.vocab_size)
        name = f"byte-level BPE trained on this text (tokenizers {bpe.TOKENIZERS_VERSION})"
        definition = tokenizer.to_str().encode()
    vocab_size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values(), default=0)
    end_id = Ending.of(file, text.end_token).id_in(tokenizer)
    progress(f"encoding {source}")
    ids = encode_documents(tokenizer, documents(), end_id, vocab_size=vocab_size, name=name)
    return Written(source, name, definition, vocab_size, end_id), ids


def _told(documents: "Iterator[NDArray[np.int32]]", progress: Progress) -> "Iterator[NDArray[np.int32]]":
    """The same, and now and then how far it is."""
    said_s, count, size = time.monotonic(), 0, 0
    for ids in documents:
        yield ids
        count, size = count + 1, size + ids.size
        if time.monotonic() - said_s >= _EVERY_S:
            said_s = time.monotonic()
            progress(f"{size / 1e6:,.1f} M tokens of {count:,} documents are written")


def _noun(
    folder: str, manifest: "Manifest", checked: bool = False, problems: tuple[str, ...] = ()
) -> TokenFolder:
    text = TextSummary(
        manifest.source,
        manifest.tokenizer,
        manifest.tokens,
        manifest.distinct_ids,
        manifest.vocab_size,
        manifest.digest,
        manifest.documents,
    )
    size, shards = sum(manifest.sizes().values()), len(manifest.shards)
    return TokenFolder(folder, text, manifest.end_id, manifest.dtype, shards, size, checked, problems)
