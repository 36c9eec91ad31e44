"""The optimizer: Muon for the hidden convolutions, Adam for all else."""

import torch


def orthogonalize(matrix):
    """Bring the singular values of a matrix (rows, columns) close to 1: most to 0.7 to 1.2.

    Five Newton-Schulz steps x → (a + b xxᵀ + c (xxᵀ)²) x, by way of the small matrix xxᵀ; the
    coefficients are Keller Jordan's (2024, https://kellerjordan.github.io/posts/muon).
    """
    x = matrix / (matrix.norm() + 1e-7)
    gram, product = x @ x.T, torch.eye(len(x), dtype=x.dtype, device=x.device)
    for _ in range(5):
        factor = torch.addmm(gram, gram, gram, beta=-4.7750, alpha=2.0315)
        factor.diagonal().add_(3.4445)
        gram, product = factor @ gram @ factor, factor @ product
    return product @ x


class Muon(torch.optim.Adam):
    """Train `params`, in the order of the layers, at the learning rate `lr` of Adam.

    The gradient of a convolution, a matrix (out, 3 × 3 × in), is strong in few directions, and weak
    in others, such as rare colors. Muon averages gradients, gives all directions one strength, and
    steps as far as Adam does, times `scale` (0.2: Liu et al. 2025, arXiv:2502.16982); weights
    shrink by `lr` × `weight_decay`. Adam trains biases, first and last layer, and earlier groups.
    """

    def __init__(self, params, lr=1e-3, momentum=0.95, scale=0.45, weight_decay=1.0, fused=True):
        super().__init__(params, lr, fused=fused)
        self.momentum, self.scale, self.weight_decay = momentum, scale, weight_decay
        self.hidden = [w for w in self.param_groups[-1]['params'] if w.dim() > 1][1:-1]

    @torch.no_grad()
    def step(self):
        """Take one step; then the gradients of the hidden convolutions are None."""
        for weight in self.hidden:
            if weight.grad is not None:
                self.step_hidden(weight, self.state[weight])
                weight.grad = None  # Adam takes all that is left
        super().step()

    def step_hidden(self, weight, state):
        """Take Muon's step of one convolution (out, in, 3, 3), by GradScaler in float16."""
        if not state:
            state.update(step=weight.new_zeros(()), momentum=torch.zeros_like(weight))
        scale, overflow = (getattr(self, name, None) for name in ('grad_scale', 'found_inf'))
        gradient = weight.grad if scale is None else weight.grad / scale
        averaged = self.momentum * state['momentum'] + gradient
        update = (gradient + self.momentum * averaged).permute(0, 2, 3, 1)  # as it lies in memory
        update = orthogonalize(update.flatten(1)).view_as(update).permute(0, 3, 1, 2)
        size = self.scale * max(len(weight), weight[0].numel()) ** 0.5
        update = size * update + self.weight_decay * weight
        if overflow is not None:
            averaged = torch.where(overflow > 0, state['momentum'], averaged)
            update = torch.where(overflow > 0, 0, update)
        state['momentum'].copy_(averaged)
        state['step'] += 1 if overflow is None else 1 - overflow  # as Adam counts them
        weight.sub_(self.param_groups[-1]['lr'] * update)
