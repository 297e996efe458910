"""RMSNorm (arXiv 1910.07467) of a residual stream that may be narrower than the gain."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """torch's own, for inputs of fewer bits than the gain, too: computed in the gain's dtype, given back in x's."""

    def forward(
        self,
        x: Tensor,  # [..., D]
    ) -> Tensor:  # [..., D]
        wide = F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)
        return wide.to(x.dtype)
