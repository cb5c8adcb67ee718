"""What benchmarks.train_peers starts in other trainers' interpreters, under torchrun: plain scripts, which
need nothing of Shardwise. Each takes its settings as one JSON argument and prints one JSON line of the first
rank: when each step ended, in seconds; its losses; how many parameters it trained."""
