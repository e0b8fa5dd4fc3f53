"""One training step of a model on pairs of responses: the file that a student makes fast."""

import torch


def make_step(model, optimizer, loss, cfg):
    """-> step(batch, ref_logps) -> the mean loss, detached.

    A step computes the log-probs of a batch (see data.Batch) and the loss, backpropagates, clips
    the gradient to norm 1 and lets the optimizer change the model's weights. All batches have the
    same shapes. ref_logps: (B, 2, T).
    """

    def step(batch, ref_logps):
        optimizer.zero_grad(set_to_none=True)
        losses, _ = loss(model.logps(batch), ref_logps, batch, cfg)
        mean = losses.mean()
        mean.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return mean.detach()

    return step
