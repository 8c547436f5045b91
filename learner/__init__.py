"""The DeepSpeed learner: self-distillation loss, EMA teacher, weight publication, checkpoints."""
