"""RMSNorm (arXiv 1910.07467) for inputs whose dtype may have fewer bits than that of the gain."""

import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """nn.RMSNorm, computed in the dtype of the gain and returned in the dtype of x."""

    def forward(
        self,
        x: Tensor,  # [..., D]
    ) -> Tensor:  # [..., D]
        wide = F.rms_norm(x.to(self.weight.dtype), self.normalized_shape, self.weight, self.eps)
        return wide.to(x.dtype)
