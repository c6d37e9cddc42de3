"""The operations of a row of logits: each against what torch says of the whole row."""

import torch

from gemkit.ops import WHOLE


def test_each_operation_is_that_of_torch():
    generator = torch.Generator().manual_seed(0)
    z_CV = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    ids_CK = torch.tensor([[0, 6], [3, 2], [5, 1]])
    p_CV = z_CV.clone()
    torch.testing.assert_close(WHOLE.softmax_(p_CV), z_CV.logsumexp(-1))
    torch.testing.assert_close(p_CV, z_CV.softmax(-1))
    torch.testing.assert_close(WHOLE.log_softmax_(z_CV.clone()), z_CV.log_softmax(-1))
    assert torch.equal(WHOLE.gather(z_CV, ids_CK), torch.stack([z_CV[i, ids_CK[i]] for i in range(3)]))
    added_CV = WHOLE.scatter_add_(z_CV.clone(), ids_CK, torch.ones(3, 2, dtype=z_CV.dtype))
    assert torch.equal((added_CV - z_CV).round().nonzero()[:, 1], ids_CK.sort(-1).values.flatten())
    torch.testing.assert_close(WHOLE.dot(p_CV, z_CV), (p_CV * z_CV).sum(-1))
    torch.testing.assert_close(WHOLE.mean(z_CV), z_CV.mean(-1))
    assert WHOLE.size(z_CV) == 7
    assert set(WHOLE.topk(z_CV, 2)[0].tolist()) == set(z_CV[0].argsort()[-2:].tolist())
    assert WHOLE.topk(z_CV, 9).shape == (3, 7)
