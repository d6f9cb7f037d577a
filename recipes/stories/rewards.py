"""A word that is rare under the reference, worth a point for each of its first three appearances."""


def score(prompts: list[str], responses: list[str]) -> list[float]:
    """1 for each of the first three times "happy" occurs in a response."""
    return [float(min(3, response.lower().count("happy"))) for response in responses]
