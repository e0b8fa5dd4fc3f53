"""The batches of a training: rows in cyclic order, collated at each visit or once."""

import torch

from data import Sizes, collate, encode, sizes

ROOM = 2**30  # bytes that rows may take on the device once they are collated
SMALL = 2**15  # tokens of a batch below which padding hardly costs time on a GPU


class Batches:
    """batches(step) is the Batch of the rows step * size to (step + 1) * size, in cyclic order.

    On a CPU rows are collated at each visit, in tight shapes, since every token costs time there.
    Where steps are captured in CUDA graphs (or compiled), all batches have one shape. Then all rows
    are collated at once, and a batch is a choice of rows on the device, unless they would take too
    much memory or consist of padding mostly.

    least: the Sizes of earlier rows of the run; `sizes` are theirs and those of these rows.
    """

    def __init__(self, lab, rows, size, least=None):
        self.lab, self.rows, self.size = lab, rows, size
        self.tokenizer = lab.world.tokenizer if lab.world.kind == "text" else None
        self.sizes, self.whole = None, None
        if self.tokenizer and (lab.captured or lab.compiled):
            found = sizes(rows, size, self.tokenizer)
            self.sizes = found.grown(least) if least else found
        if lab.captured and self.fits():
            fixed = self.sizes or False
            self.whole = collate(rows, self.tokenizer, fixed, packed=False).to(lab.device)

    def fits(self):
        """Whether to collate all rows at once, one prompt tree per packed row."""
        n, found = len(self.rows), self.sizes or Sizes()
        if self.tokenizer is None:
            row = self.rows[0]["responses"]
            each = row.numel() * row.element_size() if isinstance(row, torch.Tensor) else 1024
            return n * each <= ROOM
        used = sum(len(encode(row, self.tokenizer)["tree"].tokens) for row in self.rows)
        dense = n * found.length <= 1.5 * used or self.size * found.length <= SMALL
        each = 24 * found.length + found.branches**2 + 32 * found.responses * found.tokens
        return dense and n * each <= ROOM

    def __call__(self, step):
        n = len(self.rows)
        places = [i % n for i in range(step * self.size, (step + 1) * self.size)]
        if self.whole is not None:
            return self.whole.take(torch.tensor(places).to(self.lab.device, non_blocking=True))
        return self.lab.collate([self.rows[i] for i in places], fixed=self.sizes or False)
