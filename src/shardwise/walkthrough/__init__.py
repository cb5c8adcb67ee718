"""Walk-throughs: a style run for real on a toy and a few ranks, recorded number by number, and told in
words."""
