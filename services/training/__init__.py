"""The training session: controller, rollouts, weight sync, checkpoints, retention guard."""
