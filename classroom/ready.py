"""The ready-made assignments, and the task sheet that a handout begins with."""

import dataclasses
import random
from dataclasses import dataclass

from classroom import hidden, outputs, properties


@dataclass(frozen=True)
class Ready:
    """One ready-made assignment.

    options: choices of ((method, what is blanked), ...); `--seed` takes one of them. constants:
    {name: choices} for the numbers in the task. task: the text, with {name} for a constant.
    written: ((what is marked by hand, points of the 100 of the mark), ...).
    """

    title: str
    options: tuple
    task: str
    constants: tuple = ()
    written: tuple = ()


@dataclass(frozen=True)
class Task:
    """A ready-made assignment without a blank: its kind (classroom/tasks.py), and as in Ready."""

    kind: str
    title: str
    task: str
    written: tuple = ()


READY = {
    1: Ready(
        "DPO: from log-probs to a loss",
        ((("nanomodel", "GPT.logps,GPT._token_logps"), ("dpo", "loss")),),
        "First the log-probs: turn the logits of a model into the log-prob of every token of the "
        "responses. `self.logits(batch)` returns the logits (B, K, T, V), each from the hidden "
        "state before the token that it predicts; `batch.target` (B, K, T) has the tokens, and "
        "`batch.mask` says which of them count. A few lines suffice. `GPT._token_logps`, with "
        "which the project saves memory, is blank as well: you may use it or not.\n\n"
        "Then the loss of DPO: sum the log-probs over the tokens of a response, subtract those of "
        "the reference, and put the difference of the two log-ratios into a logistic loss. "
        "Train a language model with both,\n\n"
        "    python train.py --method dpo --world reviews --beta {beta}\n\n"
        "and say why both log-probs may fall while the margin rises.",
        (("beta", ("0.05", "0.1", "0.3")),),
    ),
    2: Ready(
        "Noisy labels: IPO, conservative DPO and the unbiased loss of rDPO",
        ((("rdpo", "loss"), ("survey", "loss:ipo,loss:ipo_mean,loss:cdpo,loss:rdpo")),),
        "A share of {flip} of the labels is flipped. Write the loss of rDPO, whose mean over the "
        "flips is the loss of clean labels, in its own file and as one line of the survey. Beside "
        "it write two lines of the survey that were made for noise as well: conservative DPO, "
        "which averages DPO's loss over both labels with the weights 1 - epsilon and epsilon; and "
        "IPO, which moves the difference h of the log-ratios to 1 / (2 tau) by least squares "
        "(`ipo_mean`: h of log-ratios that are means over tokens). Then train at several flip "
        "rates, with the right epsilon and with epsilon = {epsilon} at every rate, and plot the "
        "true reward against the flip rate:\n\n"
        "    F=0,0.1,0.2,0.3,0.4\n"
        "    python train.py --method survey --variant dpo,ipo --world bandit --flip $F --seeds 3\n"
        "    python train.py --method survey --variant cdpo,rdpo --world bandit --flip $F "
        "--epsilon =flip --seeds 3\n"
        "    python train.py --method survey --variant cdpo,rdpo --world bandit --flip $F "
        "--epsilon {epsilon} --seeds 3\n\n"
        "Which of the four losses gains from knowing the flip rate, and what does rDPO pay for a "
        "wrong epsilon?",
        (("flip", ("0.2", "0.3")), ("epsilon", ("0.2", "0.3"))),
        (("the plot of reward against flip rate, and what it shows", 20),),
    ),
    3: Ready(
        "f-DPO: derive two divergences",
        (
            (("fdpo", "forward_kl,jensen_shannon"),),
            (("fdpo", "reverse_kl,alpha_divergence"),),
            (("fdpo", "forward_kl,alpha_divergence"),),
        ),
        "The reward of f-DPO is the derivative f'(u) at the probability ratio u. Derive it for the "
        "two divergences whose functions are missing, and write them as functions of rho = log u. "
        "Which of the two punishes a policy that gives up a response of the reference?",
    ),
    4: Ready(
        "Why the chosen log-prob falls",
        ((("three_d", "loss:4"), ("ld_dpo", "loss:3")),),
        "Two lines are missing: the margin of 3D-Properties' Flex-DPO, and the mask of the tokens "
        "that the longer response has beyond the shorter one in LD-DPO. Write them. Then measure "
        "the log-probs of both responses during training,\n\n"
        "    python train.py --method three_d --variant flex --beta_rejected {beta}\n\n"
        "and answer in half a page: why does the chosen log-prob fall, where does the probability "
        "go, and what does each of the two papers change? The written answer is graded by hand.",
        (("beta", ("0.02", "0.05")),),
        (("why the chosen log-prob falls, and what the papers change", 40),),
    ),
    5: Ready(
        "Credit for tokens: from r to Q*",
        ((("r2q", "token_rewards,loss"),), (("r2q", "token_rewards"),)),
        "A language model that was trained on preferences holds a reward for every token. Write "
        "the function that reads it, and the loss. Then look at the printed token rewards of one "
        "response: which token is to blame?",
    ),
    6: Ready(
        "Lists in place of pairs",
        ((("irpo", "relevance_weights,loss"), ("adpo", "kernel_ranks,targets")),),
        "Write the weights and the loss of IRPO on graded lists, and the targets of ADPO. Both "
        "must not depend on the order in which the responses of a list are stored.",
    ),
    7: Ready(
        "Policy gradient: GRPO, then DisCO",
        ((("grpo", "advantages,loss"), ("disco", "gap,loss")),),
        "Write the advantages and the clipped loss of GRPO, and then the gap that DisCO maximizes "
        "instead, and its loss. Which questions give GRPO no gradient, and why do they give "
        "DisCO one?",
    ),
    8: Ready(
        "Diffusion-DPO on digits",
        ((("dpo", "loss"),),),
        "On images the log-probs are minus summed noise errors, one number per image. Write the "
        "loss of DPO so that it holds for tokens and for images, and train on the digits:\n\n"
        "    python train.py --method dpo --world digits --beta {beta}\n\n"
        "Look at the samples before and after, and say what the reward bought.",
        (("beta", ("0.1", "0.2")),),
    ),
}
TASKS = {
    9: Task(
        "world",
        "A world of your own",
        "Make a world: prompts, demonstrations and a true reward that a program computes, and a "
        "model that is small enough to be aligned in a minute. Fill in my_world.py; "
        "toy/world.py explains all that a world may define, and the other files in toy/ are "
        "examples. Write into its docstring, with one example, what a prompt, a response and the "
        "reward are, and how the reward can be gamed. This command must run, and the reward must "
        "rise:\n\n"
        "    python train.py --method dpo --world my_world.py\n\n"
        "Then train for longer or with a smaller --beta until the reward is gamed, or say why it "
        "cannot be.",
        (("what the reward can be gamed by, shown in a run or explained in the docstring", 15),),
    ),
    10: Task(
        "step",
        "Make the training step fast",
        "step.py has one training step. Make it faster on a card without changing what it "
        "computes: the grader compares losses and weights with those of the shipped step, in "
        "float32 and up to a thousandth of their length, and then times both in turns. "
        "Everything in step.py is yours: compile it, capture it in a CUDA graph, compute less. "
        "All batches have the same shapes. The sizes are those of classroom/clock.py. Time is "
        "marked on a card only; on a CPU the tests say how fast the step is, and a person marks "
        "it.",
    ),
}


def by_hand(written):
    """The tests that a teacher marks, as entries of assignment.json; the points are of 100."""
    return [
        dataclasses.asdict(
            hidden.Test(f"by hand: {text}", "", "written", [], points, True, "the teacher marks it")
        )
        for text, points in written
    ]


def chosen(number, seed):
    """(title, ((method, blanked), ...), task) of a ready-made assignment for one seed."""
    item, rng = READY[number], random.Random(seed)
    numbers = {name: rng.choice(values) for name, values in item.constants}
    return item.title, rng.choice(item.options), item.task.format(**numbers)


def path_of(name):
    """The path of a file of an assignment, given its name."""
    return f"{name}.py" if name in hidden.PARTS else f"methods/{name}.py"


def listing():
    """The lines of `assign.py --list`."""
    lines = ["python assign.py NUMBER --out FOLDER writes one of these:"]
    for number, item in READY.items():
        blanks = " or ".join(
            " and ".join(f"{path_of(name)} ({text})" for name, text in option)
            for option in item.options
        )
        lines.append(f"{number:>3}  {item.title}: {blanks}")
    for number, item in TASKS.items():
        lines.append(f"{number:>3}  {item.title}: a file of the student's own")
    return "\n".join(lines)


# ---------------------------------------------------------------- the task sheet


def flags(run):
    """The words of the command line of a short run."""
    both = run["settings"] | run["fields"]
    return [word for name, value in both.items() for word in (f"--{name}", str(value))]


def marked(about):
    """The lines on what is marked, with the points of 100."""
    tests = [(one, test) for one in about["files"] for test in one["tests"]]
    tests += [(None, test) for test in about["written"]]
    shares = outputs.worth([test for _, test in tests])
    points = [share * test["points"] for share, (_, test) in zip(shares, tests)]
    lines = []
    for one in about["files"]:
        most = sum(x for x, (file, _) in zip(points, tests) if file is one)
        lines.append(f"- tests of `{one['path']}`: {most:.1f} of 100 points")
    lines += [f"- {test['name']}: {test['points']} of 100 points" for test in about["written"]]
    if not about["written"]:
        lines += [
            "",
            "Nothing is marked by hand: a question in the task is for the discussion in class.",
        ]
    return lines


def readme(about, files, task, kept):
    """The README of a handout."""
    lines = [f"# {about['title']}", ""]
    if task:
        lines += [task, ""]
    lines += ["## What to write", ""]
    for one in about["files"]:
        lines.append(f"- `{one['path']}`: {', '.join(f'`{name}`' for name in one['functions'])}")
    lines += [
        "",
        "The docstring of the file has the paper's formulas, the docstring of a function its "
        "shapes. "
        + ("The comments of the solution are still there. " if kept else "")
        + "Hand in the files above and nothing else. Any formula that is right gets full marks: "
        "names, metrics and style are yours.",
        "",
        "## What is marked",
        "",
        *marked(about),
        "",
        "The tests of a file are the visible ones below, hidden ones that compare values and "
        "gradients with the solution for other inputs and other settings, and, where this sheet "
        "says so, a short run.",
        "",
        "## Conventions",
        "",
        "- `logps` and `ref_logps` are (B, K, T): B prompts, K responses, T tokens. They are 0 "
        "outside `batch.mask`. Of a pair, the chosen response comes first.",
        "- `loss` returns one loss per row, (B,), and a dict of metrics, which may be empty. The "
        "loop averages over the rows.",
        "- Whether a log-prob is summed or averaged over tokens is part of the paper: read its "
        "formula.",
        "- The log-probs of the reference are constants.",
        "- The true reward is computed by the toy world and not by a model; more is better.",
        "",
        "## Try it",
        "",
        "    pip install -r requirements.txt",
        '    python -m pytest           each test says "your turn" until you pass it',
    ]
    for file, one in zip(files, about["files"]):
        if file.name in hidden.PARTS:
            continue
        lines.append(f"    python train.py --method {file.name}           train with your file")
        if run := one.get("example"):
            said = " This run is marked by its reward."
            if not one.get("run"):
                said = (
                    " This run is not marked, since its reward does not prove a loss right; the "
                    "docstring of the file says what else to look at."
                )
            lines += [
                "",
                f"A right solution of `{file.name}` ends at a true reward of about "
                f"{run['after']:.2f} in this short run. It begins at {run['before']:.2f}, the "
                "reward of the base model:",
                "",
                f"    python train.py --method {file.name} {' '.join(flags(run))} --out run",
                "",
                f"Its curves are in {one['picture']}; compare them with your run/curves.png."
                + said,
                "",
            ]
    if lines[-1]:
        lines.append("")
    lines += ["## The visible tests", ""]
    names = {
        test["rule"]
        for one in about["files"]
        for test in one["tests"]
        if test["kind"] == "property"
    }
    lines += [
        f"- {name}: {rule.sentence}." for name, rule in properties.RULES.items() if name in names
    ]
    return "\n".join(lines) + "\n"
