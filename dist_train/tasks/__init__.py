"""Tasks: what is learnt, as phases and losses (see `dist_train.phases`)."""
