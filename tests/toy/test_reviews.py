"""The reviews world: the grammar accepts what it generates, and the truth counts what it says."""

import torch

from toy.reviews import CENTRE, DEGREE, EVERY_OWN, JOIN, OPINION, OWN, PRODUCTS, WEIGHTS, World

WORLD = World()
PROMPT = "review of the camera :"


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def parts(response, prompt=PROMPT):
    return WORLD.parts(prompt, response)


def test_every_word_is_one_token_and_reviews_fit():
    tokenizer = WORLD.tokenizer
    assert all(len(tokenizer.encode(" " + word)) == 1 for word in WORLD.arcs)
    rows = WORLD.demonstrations(500, rng())
    for row in rows:
        prompt, response = tokenizer.encode(row["prompt"]), tokenizer.encode(row["responses"][0])
        assert len(prompt) == len(row["prompt"].split()) <= WORLD.max_prompt
        assert len(response) == len(row["responses"][0].split()) < WORLD.max_response
        assert tokenizer.decode(response) == row["responses"][0]
    assert {row["prompt"].split()[3] for row in rows} == set(PRODUCTS)
    parameters = sum(p.numel() for p in WORLD.model().parameters())
    assert 100_000 < parameters < 350_000
    assert WORLD.model().config.max_position_embeddings >= WORLD.max_prompt + WORLD.max_response


def test_draws_come_from_the_generator_alone():
    assert (
        WORLD.demonstrations(20, rng(1))
        == World().demonstrations(20, rng(1))
        != WORLD.demonstrations(20, rng(2))
    )
    assert WORLD.prompts(20, rng(1)) == WORLD.prompts(20, rng(1))


def test_the_teacher_writes_better_reviews_without_errors():
    rows = WORLD.teacher(400, rng())
    assert rows == WORLD.teacher(400, rng()) and rows != WORLD.teacher(400, rng(1))
    prompts, responses = zip(*((row["prompt"], row["responses"][0]) for row in rows))
    found = [WORLD.parts(*row) for row in zip(prompts, responses)]
    assert all(part["broken"] == part["astray"] == part["unended"] == 0 for part in found)
    reward = WORLD.reward(prompts, responses).mean().item()
    base = [WORLD.demonstrations(400, rng()), WORLD.demonstrations(400, rng(), slip=0.0)]
    for others in base:
        rewards = WORLD.reward(*zip(*((row["prompt"], row["responses"][0]) for row in others)))
        assert reward > rewards.mean().item() + 0.3
    assert 0.7 < reward < 1.0


def test_the_grammar_accepts_its_own_reviews():
    import random

    draw = random.Random(0)
    for _ in range(300):
        product = draw.choice(list(PRODUCTS))
        words, first = WORLD.review(product, draw)
        found = parts(" " + " ".join(words), f"review of the {product} :")
        assert found["broken"] == found["astray"] == found["unended"] == 0, words
        assert 0 < first < len(words) <= 29


def test_broken_places_are_counted():
    assert WORLD.broken("the lens is very sharp .".split()) == 0
    for places, text in [
        (1, "the lens very sharp ."),  # a word lost
        (1, "the lens is very very sharp ."),  # a word doubled
        (1, "the pictures is sharp ."),  # number does not agree
        (1, "it has a excellent lens ."),
        (1, "the lens is . it was good ."),
        (1, "the lens is zzz sharp ."),  # a word that no clause has
        (2, "the lens very sharp and the zoom good ."),
        (3, "sharp sharp sharp ."),
    ]:
        assert WORLD.broken(text.split()) == places, text


def test_broken_is_the_least_number_of_breaks():
    """Against a slow oracle: the fewest pieces of a text that paths of the automaton can read."""
    import random

    draw, words = random.Random(1), sorted(WORLD.arcs)

    def legal(piece, start):
        states = {s for s, before in WORLD.arcs[piece[0]].items() if not start or 0 in before}
        for word in piece[1:]:
            states = {s for s, before in WORLD.arcs[word].items() if states & set(before)}
        return bool(states)

    for _ in range(60):
        text = WORLD.review("tent", draw)[0]
        for _ in range(draw.randint(0, 4)):
            text[draw.randrange(len(text))] = draw.choice(words)
        fewest = [0] + [len(text) + 1] * len(text)
        for end in range(1, len(text) + 1):
            for start in range(end):
                if start and legal(text[start:end], False):
                    fewest[end] = min(fewest[end], fewest[start] + 1)
                elif not start:
                    fewest[end] = min(
                        fewest[end],
                        0
                        if legal(text[:end], True)
                        else 1
                        if legal(text[:end], False)
                        else len(text) + 1,
                    )
        assert WORLD.broken(text) == fewest[-1], text


def test_sentiment_respects_degrees_and_negations():
    value = {
        text: parts(f" the lens is {text} .")["sentiment"]
        for text in ("good", "not good", "bad", "not bad", "very good", "great", "not very good")
    }
    assert (
        value["great"]
        > value["very good"]
        > value["good"]
        > value["not bad"]
        > 0
        > value["not good"]
        > value["bad"]
    )
    assert value["not very good"] == value["not good"]
    # a negation ends with its clause, also if it is in the prompt
    assert parts(" bad .", PROMPT + " it is not")["sentiment"] == value["not bad"]
    assert parts(" the lens is not good and the zoom is good .")["sentiment"] == (1 - 0.75) / 3
    # remarks without an opinion change nothing, and ten times the length is not ten times as good
    assert parts(" it is good . i got it last week .")["sentiment"] == value["good"]
    assert parts(" it is good ." * 10)["sentiment"] < 2 * value["good"]


def test_penalties_have_the_values_of_examples():
    assert parts(" the lens is good and the zoom is nice .")["repeated"] == 0
    assert parts(" the lens is good and the lens is good .")["repeated"] == 2
    assert parts(" the lens is good and the breakfast is nice .")["astray"] == 1
    assert (
        parts(" the screen is good .", "review of the laptop :")["astray"]
        == parts(" the screen is good .", "review of the phone :")["astray"]
        == 0
    )
    assert (
        parts(" the lens is good")["unended"] == parts("")["unended"] == 1
        and parts(" it is good .")["unended"] == 0
    )
    assert parts(" the lens is good .", "what about it")["astray"] == 0  # a product nobody named


def test_reward_is_the_weighted_sum_and_finite_for_any_text():
    texts = [
        " the lens is good .",
        "",
        "\x00 \ufffd ...",
        " good" * 300,
        WORLD.tokenizer.encode(" it is bad .") + [WORLD.tokenizer.eot],
        [0, 255, 3],
    ]
    reward = WORLD.reward([PROMPT] * len(texts), texts)
    assert (
        reward.dtype == torch.float64 and reward.shape == (len(texts),) and reward.isfinite().all()
    )
    assert reward[0].item() == CENTRE + WEIGHTS["sentiment"] * 0.5
    assert reward[4] == WORLD.reward([PROMPT], [" it is bad ."])[0]
    assert torch.equal(reward, WORLD.reward([PROMPT] * len(texts), texts))
    assert reward[0] > reward[1] > reward[3]


def test_the_truth_of_demonstrations_is_mixed():
    rows = WORLD.demonstrations(2000, rng())
    reward = WORLD.reward([row["prompt"] for row in rows], [row["responses"][0] for row in rows])
    assert abs(reward.mean()) < 0.3 and 0.8 < reward.std() < 1.6
    slips = [WORLD.parts(row["prompt"], row["responses"][0])["broken"] > 0 for row in rows]
    assert 0.02 < sum(slips) / len(slips) < 0.25


def test_word_lists_do_not_contradict_each_other():
    own = [word for parts in PRODUCTS.values() for word in " ".join(parts).split()]
    assert (
        not set(own) & {"good", "bad", *JOIN, *DEGREE}
        and not set(DEGREE) & set(OPINION)
        and EVERY_OWN == set(own) | set(OWN)
    )
    for level_words in PRODUCTS.values():
        assert all(OPINION[word] == 1 for word in level_words[2].split()) and all(
            OPINION[word] == -1 for word in level_words[3].split()
        )
