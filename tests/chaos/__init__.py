"""The whole node under faults, with a written report (`make chaos`): scenarios that try to break each promise."""
