"""Walk-throughs: a style run for real on a toy and a few ranks, recorded, and told in words."""
