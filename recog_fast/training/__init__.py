"""The training script and what it is made of: settings, schedules, data, verification, logs, loop."""
