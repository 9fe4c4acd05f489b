"""The attentive probe: one learned query attends to the frozen tokens of a video, then one linear
layer classifies. Needs model.py.

It is V-JEPA's probe (arXiv 2404.08471) without its MLP block. `attentive` trains several side by
side, one per learning rate, and returns their predictions; linprobe.py chooses among them.

Shapes: N training videos, N' test videos, V views, M tokens of a view (of --token-grid), D width, C
classes, L settings, B batch.
"""

import math

import torch
import torch.nn.functional as F

from model import XavierLinear


class AttentiveProbe(torch.nn.Module):
    """tokens [B, V*M, D] -> logits [B, C], by `classify_all`: multi-head cross-attention from one
    learned query, then a linear layer.

    Some usual parts are missing, because the probe can express the same without them. A projection
    of the learned query is another query; the query added to the result would be a constant, which
    the classifier's bias can hold. A bias of keys adds the same number to all scores of a head,
    which the softmax ignores. The norm's scale and shift can be part of key, value and classifier;
    a bias of values and an output projection can be part of the classifier."""

    def __init__(self, width, heads, classes):
        super().__init__()
        # one query, of which each head has its part
        self.query = torch.nn.Parameter(0.02 * torch.randn(heads, 1, width // heads))
        self.key = XavierLinear(width, width, bias=False)
        self.value = XavierLinear(width, width, bias=False)
        self.classifier = torch.nn.Linear(width, classes)

    # Usual attention computes a key K x and a value V x of every token x: scores q . (K x), their
    # softmax a, output sum of a V x. A head has one and the same query q for all videos, so that
    # neither has to be computed for each token:
    #   q . (K x) = (K^T q) . x
    #       `token_query` computes K^T q once; `classify_all` multiplies it with all tokens.
    #   sum of a V x = V (sum of a x)
    #       `classify_all` averages the tokens with the weights a; `classify` applies V.

    def token_query(self):
        """What the tokens are compared with: K^T q of each head, scaled, [heads, D]."""
        key = self.key.weight.unflatten(0, (len(self.query), -1))  # [heads, D / heads, D]
        return (self.query @ key).squeeze(1) / key.shape[1] ** 0.5

    def classify(self, means):
        """The heads' weighted means of tokens [B, heads, D] -> logits [B, C]."""
        value = self.value.weight.unflatten(0, (len(self.query), -1))  # [heads, D / heads, D]
        return self.classifier(torch.einsum("hvd,bhd->bhv", value, means).flatten(1))


def classify_all(probes, tokens):
    """The logits of several probes for the same tokens [B, V*M, D]: L times [B, C]. All their
    queries meet the tokens in one product: faster than one probe after the other."""
    tokens = F.layer_norm(tokens, tokens.shape[-1:])
    queries = torch.cat([probe.token_query() for probe in probes])  # [L * heads, D]
    attention = (tokens @ queries.T).softmax(1)  # [B, V*M, L * heads]
    means = (attention.mT @ tokens).unflatten(1, (len(probes), -1))  # [B, L, heads, D]
    return [probe.classify(each) for probe, each in zip(probes, means.unbind(1), strict=True)]


def attentive(
    train, labels, test, settings, seed, *, classes, heads, epochs, least_steps=0, batch=64
):
    """Trains probes and applies them -> for each of the L settings the predicted classes of the
    test videos, [L, N'].

    train, test: TokenRows (tgm/features.py); labels [N]: the classes of train; settings: [{"rate":
    learning rate}, ...]; least_steps: adds epochs until there are so many steps. All settings are
    trained together, each as if alone: their losses are added up, and each has its own
    parameters."""
    device = labels.device
    probes = []
    groups = []
    for _ in settings:
        # Seeded again for each: all start with the same weights, and the order of batches, drawn
        # below, is the same for any number of settings.
        torch.manual_seed(seed)
        probe = AttentiveProbe(train.array.shape[-1], heads, classes).to(device)
        probes.append(probe)
        groups.append({"params": list(probe.parameters())})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)  # rates: see below
    steps = math.ceil(len(train) / batch)  # of an epoch
    epochs = max(epochs, math.ceil(least_steps / steps))
    for epoch in range(epochs):
        for step, index in enumerate(torch.randperm(len(train)).split(batch)):
            # half a cosine from 1 to 0
            factor = 0.5 * (1 + math.cos(math.pi * (epoch + step / steps) / epochs))
            for group, setting in zip(optimizer.param_groups, settings, strict=True):
                group["lr"] = setting["rate"] * factor
            optimizer.zero_grad()
            logits = classify_all(probes, train[index].read(device))
            sum(F.cross_entropy(each, labels[index]) for each in logits).backward()
            optimizer.step()
    predicted = []
    with torch.inference_mode():
        for index in torch.arange(len(test)).split(batch):
            logits = classify_all(probes, test[index].read(device))
            predicted.append(torch.stack([each.argmax(1) for each in logits]))
    return torch.cat(predicted, dim=1)
