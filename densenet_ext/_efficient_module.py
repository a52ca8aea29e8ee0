"""The choice of implementation that dense layers, dense blocks and networks have in common."""

from torch import nn

from ._checks import check_efficient, check_kept


class EfficientModule(nn.Module):
    """A module whose implementation may be changed at any time; a change also reaches all such modules inside it.

    The implementations give the same numbers and read the same parameters. They differ in memory and time.
    """

    _efficient: bool | str = False
    _keep_bottleneck: bool | int | str = False

    @property
    def efficient(self) -> bool | str:
        """False, 'checkpoint' or 'fused'. Setting it to True sets 'fused'.

        Raises:
            ValueError: it is set to another value; nothing was changed.
        """
        return self._efficient

    @efficient.setter
    def efficient(self, value: bool | str) -> None:
        self._set_everywhere("_efficient", check_efficient(value))

    @property
    def keep_bottleneck(self) -> bool | int | str:
        """The outputs of conv1 that 'fused' keeps for backward, in place of computing them again.

        True: all; False: none; a number: those of so many last layers of each block; 'auto': what costs no memory, where
        a whole network runs up to its head, and none elsewhere.

        Raises:
            ValueError: it is set to something else; nothing was changed.
        """
        return self._keep_bottleneck

    @keep_bottleneck.setter
    def keep_bottleneck(self, value: bool | int | str) -> None:
        self._set_everywhere("_keep_bottleneck", check_kept(value, "keep_bottleneck", auto=True))

    def _set_everywhere(self, name: str, value: bool | str) -> None:
        for module in self.modules():
            if isinstance(module, EfficientModule):
                setattr(module, name, value)
