"""What the trainers share: the loop, a batch, the budget, the learner, evaluation, the end of a run."""
