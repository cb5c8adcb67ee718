"""Weights from and to a folder of safetensors files in Hugging Face's own names. No rank ever holds the whole
model: a parameter is read as the slice that a rank keeps, and written one tensor at a time."""

from shardwise.train.weights.reading import read_weights as read_weights
from shardwise.train.weights.writing import write_weights as write_weights
