"""Numbers that the ops take for what they do; csrc/stage/stage.h has the same."""

TAIL_NONE, TAIL_TRANSITION, TAIL_HEAD = 0, 1, 2
MASK_PRE_NORM, MASK_PRE_CONV1, MASK_PRE_CONV2, MASK_DROPOUT = 1, 2, 4, 8
DX_NONE, DX_OWN_LAYOUT, DX_CHANNELS_LAST = 0, 1, 2
