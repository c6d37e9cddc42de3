"""What answers are worth in the tests of RL."""


def length(prompt, answer, record) -> float:
    return float(len(answer))
