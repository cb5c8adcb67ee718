"""The entry of every rank of `shardwise train`."""

import os

import msgspec
import torch

from shardwise.launch import RankContext
from shardwise.launch.broadcast import broadcast
from shardwise.text.samples import Samples
from shardwise.text.stream import TokenStream
from shardwise.train.loop import Loop, TrainJob


def pack(job: TrainJob, stream: TokenStream | None) -> bytes:
    """The payload of run(), of which rank 0's counts: the job's JSON on one line, then the token stream."""
    return msgspec.json.encode(job) + b"\n" + (stream.to_bytes() if stream is not None else b"")


def run(context: RankContext, payload: bytes) -> bytes:
    """Returns a train.loop.Result in JSON."""
    head, _, body = broadcast(payload, context).partition(b"\n")
    job = msgspec.json.decode(head, type=TrainJob)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    stream = TokenStream.from_bytes(body)
    samples = Samples.of(stream, job.settings.seq, job.settings.seed, job.options.held_out)
    return msgspec.json.encode(Loop(context, job, samples).run())
