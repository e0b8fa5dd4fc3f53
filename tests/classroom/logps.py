"""What an assignment about the log-probs of nanomodel.GPT needs: calls, and a plain solution.

The shipped `GPT.logps` also decides how many logits are held at once and what is computed on which
device. A single edit of these lines changes no value, so the edits that prove the hidden tests are
made in PLAIN, which is what a student would write.
"""

import dataclasses
from types import SimpleNamespace

from data import collate
from tests.test_gpt import IDS, grow, make

PLAIN = {
    "GPT.logps": """\
        logits = self.logits(batch)
        logps = logits.log_softmax(-1).gather(-1, batch.target[..., None])[..., 0]
        return logps * batch.mask""",
}
FREE = ("GPT._token_logps",)  # a part of the shipped way that nobody has to write
SURVIVORS = {}
READ = ("mask", "tokens", "position", "branch", "sees", "source", "target", "keys")


def calls(seed):
    """{function: [arguments]}: small random models on ragged pairs, lists and trees of responses.

    All tensors have other values for another seed.
    """
    made = []
    for number, kind in enumerate(("pairs", "lists", "absent", "context", "tree", "pairs")):
        model = make(seed=1000 + 10 * seed + number, tokenizer=None)
        batch = collate(grow(kind, n=2, seed=2000 + 10 * seed + number), IDS)
        columns = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch)}
        made.append((model, SimpleNamespace(**{name: columns[name] for name in READ})))
    return {"GPT.logps": made}
