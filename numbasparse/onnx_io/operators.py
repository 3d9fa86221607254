"""The table of operators that can be imported: the one place that knows them by name."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from numbasparse.onnx_io import layers, shapes
from numbasparse.onnx_io.builder import NodeContext

OPERATORS: dict[str, Callable[[NodeContext], Any]] = {
    # layers
    "AveragePool": layers.average_pool,
    "BatchNormalization": layers.batch_norm,
    "Conv": layers.conv,
    "DepthToSpace": layers.depth_to_space,
    "Gemm": layers.gemm,
    "GlobalAveragePool": layers.global_pool,
    "GlobalMaxPool": layers.global_pool,
    "InstanceNormalization": layers.instance_norm,
    "MatMul": layers.matmul,
    "MaxPool": layers.max_pool,
    "Resize": layers.resize,
    "SpaceToDepth": layers.space_to_depth,
    "Upsample": layers.upsample,
    # activations
    "Clip": layers.clip,
    "Elu": layers.module(lambda c: nn.ELU(c.attribute("alpha", 1.0))),
    "Gelu": layers.module(lambda c: nn.GELU(approximate=c.expect("approximate", "none", "tanh"))),
    "HardSigmoid": layers.hard_sigmoid,
    "HardSwish": layers.module(lambda c: nn.Hardswish()),
    "LeakyRelu": layers.module(lambda c: nn.LeakyReLU(c.attribute("alpha", 0.01))),
    "LogSoftmax": layers.softmax,
    "Mish": layers.module(lambda c: nn.Mish()),
    "PRelu": layers.prelu,
    "Relu": layers.module(lambda c: nn.ReLU()),
    "Sigmoid": layers.module(lambda c: nn.Sigmoid()),
    "Softmax": layers.softmax,
    "Softplus": layers.module(lambda c: nn.Softplus()),
    "Tanh": layers.module(lambda c: nn.Tanh()),
    # arithmetic
    "Abs": layers.function(torch.abs),
    "Add": layers.binary(torch.add, operator.add),
    "Div": layers.binary(torch.div, layers.divide_sizes),
    "Erf": layers.function(torch.erf),
    "Exp": layers.function(torch.exp),
    "Mul": layers.multiply,
    "Neg": layers.function(torch.neg),
    "Sqrt": layers.function(torch.sqrt),
    "Sub": layers.binary(torch.sub, operator.sub),
    # values moved
    "Cast": shapes.cast,
    "Concat": shapes.concat,
    "Constant": shapes.constant,
    "ConstantOfShape": shapes.constant_of_shape,
    "Dropout": shapes.dropout,
    "Expand": shapes.expand,
    "Flatten": shapes.flatten,
    "Gather": shapes.gather,
    "Identity": shapes.identity,
    "Pad": shapes.pad,
    "ReduceMean": shapes.reduce_mean,
    "Reshape": shapes.reshape,
    "Shape": shapes.shape,
    "Slice": shapes.slice_,
    "Split": shapes.split,
    "Squeeze": shapes.squeeze,
    "Transpose": shapes.transpose,
    "Unsqueeze": shapes.unsqueeze,
}
