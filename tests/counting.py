"""What a GPU would be asked to do: the kernels of some work, the times that the CPU waits for it, and dtype copies."""

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WAITS = {"_local_scalar_dense", "nonzero", "equal", "masked_select", "is_nonzero"}


class Counted(TorchDispatchMode):
    """Counts operations, views left out, that run within."""

    def __init__(self):
        super().__init__()
        self.kernels = self.waits = self.casts = self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Count the operation and run it."""
        kwargs, name = kwargs or {}, func._schema.name.partition("::")[2]
        out = func(*args, **kwargs)
        if name in WAITS:
            self.waits += 1
        elif not any(one.alias_info and not one.alias_info.is_write for one in func._schema.returns):
            self.kernels += 1
            self.casts += name == "_to_copy" and out.dtype != args[0].dtype
            # An index is looked up and not read whole.
            touched = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)]
            self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in touched)
        return out
