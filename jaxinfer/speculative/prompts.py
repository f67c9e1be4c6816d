"""Short beginnings of texts of many kinds, whose continuations acceptance is measured on."""

PROMPTS = (
    "The history of the town begins with a market where two roads met, and",
    "To make a simple soup for four people, first",
    "def mean(values):\n    ",
    "The difference between a virus and a bacterium is that",
    "Dear Ms. Alvarez,\n\nThank you for",
    "In this paper we study how the temperature of a lake",
    "Once there was a fox who lived at the edge of a wood. Every morning",
    "Question: How do plants make sugar out of light?\nAnswer:",
    "The train leaves at nine and reaches the coast by noon, so",
    "Three reasons to write tests before code:\n1.",
    "It was raining when the detective arrived, and nobody",
    "The Second World War changed the way that governments",
)
