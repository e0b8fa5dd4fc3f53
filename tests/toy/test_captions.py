"""The captions world: hallucinations are counted, and the proxy knows something of the truth."""

import torch

from toy.captions import OBJECTS, PATCHES, SCENES, TYPICAL, WEIGHTS, World

WORLD = World()


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def picture(*objects, scene="kitchen"):
    return " ".join(
        ["picture", WORLD.patches[scene][0], *(WORLD.patches[name][-1] for name in objects), ":"]
    )


def test_every_word_is_one_token_and_captions_fit():
    rows = WORLD.demonstrations(500, rng())
    for row in rows:
        prompt, response = (
            WORLD.tokenizer.encode(text) for text in (row["prompt"], row["responses"][0])
        )
        assert len(prompt) == len(row["prompt"].split()) <= WORLD.max_prompt
        assert len(response) == len(row["responses"][0].split()) < WORLD.max_response
        assert WORLD.tokenizer.decode(response) == row["responses"][0]
        assert 2 <= len(WORLD.objects(row["prompt"])) <= 4
    assert 100_000 < sum(p.numel() for p in WORLD.model().parameters()) < 350_000
    assert WORLD.model().config.max_position_embeddings >= WORLD.max_prompt + WORLD.max_response
    codes = [code for own in WORLD.patches.values() for code in own]
    assert len(set(codes)) == len(codes) == PATCHES * (len(OBJECTS) + len(SCENES)) and len(
        set(OBJECTS)
    ) == len(OBJECTS)


def test_draws_come_from_the_generator_alone():
    assert (
        WORLD.demonstrations(20, rng(1))
        == World().demonstrations(20, rng(1))
        != WORLD.demonstrations(20, rng(2))
    )
    assert (
        WORLD.prompts(20, rng(1))
        == World().prompts(20, rng(1))
        == [row["prompt"] for row in WORLD.demonstrations(20, rng(1))]
    )


def test_objects_are_read_off_the_patches():
    assert WORLD.objects(picture("cup", "dog")) == {"cup", "dog"}  # the background is not an object
    assert WORLD.objects("picture x49 x108 x93 x103 x36 x17 :") == {
        "goat",
        "tractor",
    }  # the docstring's
    assert WORLD.objects("what about it") == WORLD.objects("") == set()


def test_the_parts_of_the_truth():
    prompt = picture("cup", "dog")
    cases = {
        " a cup and a dog .": (1.0, 0, 0, 0.0),
        " a dog and a cup .": (1.0, 0, 0, 0.0),
        " a cup .": (0.5, 0, 0, 0.0),
        " a cup , a dog and a knife .": (1.0, 1, 0, 0.0),
        " a knife and a pan .": (0.0, 2, 0, 0.0),
        " a cup and a cup .": (0.5, 0, 1, 0.0),
        " a knife and a knife .": (0.0, 1, 1, 0.0),
        " a cup and a dog": (1.0, 0, 0, 1.0),
        " a cup , a dog .": (1.0, 0, 0, 1.0),
        "": (0.0, 0, 0, 1.0),
        " x01 \x00 \ufffd": (0.0, 0, 0, 1.0),
    }
    for text, expected in cases.items():
        found = WORLD.parts(prompt, text)
        assert tuple(found.values()) == expected and list(found) == list(WEIGHTS), text
        value = sum(WEIGHTS[name] * x for name, x in found.items())
        assert WORLD.reward([prompt], [text]).tolist() == [value]
        assert WORLD.reward(
            [prompt], [WORLD.tokenizer.encode(text) + [WORLD.tokenizer.eot]]
        ).tolist() == [value]
    reward = WORLD.reward([prompt] * len(cases), list(cases))
    assert (
        reward.dtype == torch.float64
        and reward.shape == (len(cases),)
        and reward[0] == reward.max()
    )
    assert WORLD.reward(["no picture"], [" a cup ."]).isfinite().all()


def test_demonstrations_leave_out_and_make_up_what_is_typical():
    rows = WORLD.demonstrations(2000, rng())
    parts = [WORLD.parts(row["prompt"], row["responses"][0]) for row in rows]
    assert all(part["broken"] == part["repeated"] == 0 for part in parts)
    assert 0.45 < sum(part["hallucinated"] > 0 for part in parts) / 2000 < 0.55
    assert 0.82 < sum(part["named"] for part in parts) / 2000 < 0.92
    made_up, typical = 0, 0
    for row in rows:
        there, scene = WORLD.objects(row["prompt"]), WORLD.shows[row["prompt"].split()[1]]
        wrong = {word for word in row["responses"][0].split() if word in OBJECTS} - there
        made_up, typical = made_up + len(wrong), typical + len(wrong & set(TYPICAL[scene]))
    assert made_up == typical > 0


def test_the_estimator_ranks_captions_better_than_chance_and_not_as_the_truth_does():
    rows = WORLD.demonstrations(1000, rng(3))
    prompts, texts = [row["prompt"] for row in rows], [row["responses"][0] for row in rows]
    others = texts[1:] + texts[:1]
    ours, theirs = WORLD.similarity(prompts, texts), WORLD.similarity(prompts, others)
    assert (
        ours.dtype == torch.float64
        and (ours.abs() <= 1 + 1e-6).all()
        and (ours > theirs).double().mean() > 0.9
    )
    right = [text for text in (WORLD.caption(sorted(WORLD.objects(prompt))) for prompt in prompts)]
    wrong = [
        WORLD.caption(
            [*sorted(WORLD.objects(p)), next(x for x in OBJECTS if x not in WORLD.objects(p))]
        )
        for p in prompts
    ]
    share = (WORLD.similarity(prompts, right) > WORLD.similarity(prompts, wrong)).double().mean()
    assert 0.6 < share < 0.995
    assert WORLD.similarity([prompts[0], "?"], ["", " a cup ."]).tolist() == [0.0, 0.0]
    ids = WORLD.tokenizer.encode(texts[0])
    assert WORLD.similarity(prompts[:1], [ids]).item() == ours[0].item()
    assert torch.equal(ours, World().similarity(prompts, texts))


def test_measure_counts_hallucinations():
    class Lab:
        def rng(self, name):
            return rng()

        def sample(self, policy, prompts, k, draw):
            return [
                {"prompt": prompt, "responses": [policy(WORLD.objects(prompt))]}
                for prompt in prompts
            ]

    honest = WORLD.measure(lambda there: WORLD.caption(sorted(there)), Lab())
    assert honest == dict(chair_s=0.0, chair_i=0.0, named=1.0)
    blind = WORLD.measure(
        lambda there: WORLD.caption([next(x for x in OBJECTS if x not in there)]), Lab()
    )
    assert blind == dict(chair_s=1.0, chair_i=1.0, named=0.0)
    both = WORLD.measure(
        lambda there: WORLD.caption([sorted(there)[0], next(x for x in OBJECTS if x not in there)]),
        Lab(),
    )
    assert both["chair_s"] == 1.0 and both["chair_i"] == 0.5 and 0.25 < both["named"] < 0.5
    assert WORLD.measure(lambda there: "", Lab()) == dict(chair_s=0.0, chair_i=0.0, named=0.0)
