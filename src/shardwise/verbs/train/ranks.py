"""The entry of every rank of `shardwise train`."""

import os

import msgspec
import torch

from shardwise.launch import RankContext
from shardwise.launch.broadcast import broadcast
from shardwise.text.reading import from_bytes, to_bytes
from shardwise.text.samples import Samples
from shardwise.text.shards import Shards
from shardwise.text.stream import TokenStream
from shardwise.train.loop import Loop, TrainJob


def pack(job: TrainJob, tokens: TokenStream | Shards) -> bytes:
    """The payload of run(), of which rank 0's counts: the job's JSON on one line, then the tokens, or the
    folder where they lie."""
    return msgspec.json.encode(job) + b"\n" + to_bytes(tokens)


def run(context: RankContext, payload: bytes) -> bytes:
    """Returns a train.loop.Result in JSON."""
    head, _, body = broadcast(payload, context).partition(b"\n")
    job = msgspec.json.decode(head, type=TrainJob)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    settings = job.settings
    samples = Samples.of(from_bytes(body), settings.seq, settings.seed, job.options.held_out, job.documents)
    return msgspec.json.encode(Loop(context, job, samples).run())
