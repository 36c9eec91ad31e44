"""The optimizer: Muon for the hidden convolutions, Adam for all else."""

import torch


def orthogonalize(matrix):
    """Bring the singular values of a matrix (rows, columns) close to 1: most to 0.7 to 1.2.

    Five Newton-Schulz steps x → (a + b xxᵀ + c (xxᵀ)²) x, by way of the small matrix xxᵀ; the
    coefficients are Keller Jordan's (2024, https://kellerjordan.github.io/posts/muon).
    """
    if len(matrix) > len(matrix.T):  # else xxᵀ is the large one
        return orthogonalize(matrix.T).T
    x = matrix / (matrix.norm() + 1e-7)
    gram, product = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        gram, product = factor @ gram @ factor, factor @ product
    return product @ x


class Muon(torch.optim.Adam):
    """Train `params`, in the order of the layers, at the learning rate `lr` of Adam.

    The gradient of a convolution, a matrix (out, k × k × in), is strong in few directions, and weak
    in others, such as rare colors. Muon averages gradients, gives all directions one strength, and
    steps as far as Adam does, times `scale` (0.2: Liu et al. 2025, arXiv:2502.16982). For high
    rates, weights shrink by `lr` × `weight_decay` (Loshchilov and Hutter 2019, arXiv:1711.05101).
    Adam trains biases, norms, depthwise, first and last layers.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, scale=0.5, weight_decay=1.0, fused=True):
        super().__init__(params, lr, fused=fused)
        self.momentum, self.scale, self.weight_decay = momentum, scale, weight_decay

    @torch.no_grad()
    def step(self):
        """Take one step; then the gradients of the hidden convolutions are None."""
        weights = [(w, group['lr']) for group in self.param_groups for w in group['params']]
        for weight, lr in [pair for pair in weights if pair[0].dim() > 1][1:-1]:
            if weight.grad is not None and weight.shape[1] > 1:
                self.step_hidden(weight, lr, self.state[weight])
                weight.grad = None  # Adam takes all that is left
        super().step()

    def step_hidden(self, weight, lr, state):
        """Take Muon's step of one convolution (out, in, k, k)."""
        if not state:
            state.update(step=weight.new_zeros(()), momentum=torch.zeros_like(weight))
        # of GradScaler's, in float16; an overflow is 1 on the device, for which no step may wait
        scale, overflow = (getattr(self, name, None) for name in ('grad_scale', 'found_inf'))
        learns = 1 if overflow is None else 1 - overflow
        gradient = weight.grad if scale is None else (weight.grad / scale).nan_to_num(0, 0, 0)
        momentum = state['momentum'].mul_(self.momentum**learns).add_(learns * gradient)
        update = (gradient + self.momentum * momentum).permute(0, 2, 3, 1)  # as it lies in memory
        update = orthogonalize(update.flatten(1)).view_as(update).permute(0, 3, 1, 2)
        size = self.scale * max(len(weight), weight[0].numel()) ** 0.5
        weight.sub_(learns * lr * (size * update + self.weight_decay * weight))
        state['step'] += learns  # as Adam counts them
