"""The memory of a training step, predicted: a step is recorded without data, then its ops are rehearsed without memory.

recording    runs a model on shapes alone, and notes each tensor and each fused op
rehearsal    runs the noted ops in a mode of the library in which they compute nothing and only count
order        the order in which layers keep their bottleneck, and what may be kept at no cost
"""
