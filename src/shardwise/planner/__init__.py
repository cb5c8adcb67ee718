"""planner/: what a model's forward ties together, and how many ranks there are -> a plan, with a reason for
each rule and for what stays whole."""
