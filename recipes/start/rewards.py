"""The reward: one finite number for each response, higher is better. Put your own rule here."""


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """An example: how many different words a response has, counted up to 40."""
    return [float(min(len(set(response.lower().split())), 40)) for response in responses]
