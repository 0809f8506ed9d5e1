"""Fold constants and join operators by the passes and rules of onnxscript and onnx-ir.

It is what onnxscript.optimizer does, without its rule that makes one Split of two Slices: that one lists all nodes for
each node, which takes ten times as long as all others in a graph of 4,000 nodes.
"""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir
import onnx_ir.passes.common as passes
from onnxscript import optimizer
from onnxscript.rewriter import RewritePass, pattern
from onnxscript.rewriter.rules import common as rules

# how often constants are folded and rules applied: each makes work for the other
ROUNDS = 2
_COMMUTED = pattern.RewriteRuleSet([rules.add_0_rule, rules.mul_by_1_rule], commute=True)
_RULES = pattern.RewriteRuleSet(
    [
        *_COMMUTED.rules,
        rules.sub_0_rule,
        rules.div_by_1_rule,
        rules.dropout_zero_rule,
        rules.dropout_inference_rule,
        rules.two_reshapes_matmul_reshape_rule,
        rules.one_reshape_matmul_reshape_rule,
        rules.cast_constant_of_shape_rule,
        rules.cast_constant_of_shape_without_value_rule,
        rules.collapse_slice_rule,
        rules.collapse_slice2_rule,
        rules.materialize_reshape_shape_rule,
        rules.min_min_rule,
        rules.max_max_rule,
        rules.min_max_rule,
        rules.max_min_rule,
        rules.successive_clip_relu_rule,
        rules.successive_relu_clip_rule,
        rules.successive_relu_rule,
        rules.successive_clip_rule,
        rules.cast_cast_rule,
        rules.no_op_cast_rule,
        rules.no_op_expand_rule,
        rules.flatten_to_reshape_rule,
        rules.reshape_reshape_rule,
        rules.no_op_transpose_rule,
        rules.transpose_transpose_rule,
        rules.unsqueeze_unsqueeze_rule,
        rules.squeeze_reshape_1d_rule,
        rules.no_op_dynamic_scatter_nd_rule,
        rules.no_op_static_scatter_nd_rule,
        rules.normalize_pad_format_conv_rule,
        rules.normalize_pad_format_conv_integer_rule,
        rules.fuse_pad_into_conv_rule,
        rules.fuse_pad_into_conv_integer_rule,
        rules.fuse_batchnorm_into_conv_rule,
        rules.fuse_batchnorm_into_conv_transpose_rule,
        rules.fuse_batchnorm_into_gemm_rule,
        rules.remove_optional_bias_from_conv_rule,
        rules.remove_optional_bias_from_conv_transpose_rule,
        rules.remove_optional_bias_from_qlinear_conv_rule,
        rules.remove_optional_bias_from_gemm_rule,
    ]
)


def fold(model: ir.Model, should_fold: Callable[[ir.Node], bool | None]) -> None:
    """Fold constants, join operators and remove what nothing reads, in place.

    should_fold: tells whether a node of constants is folded; None leaves it to onnxscript
    """
    unused = (
        passes.RemoveUnusedNodesPass(),
        passes.RemoveUnusedFunctionsPass(),  # type: ignore[no-untyped-call]
        passes.RemoveUnusedOpsetsPass(),
    )
    passes.InlinePass()(model)
    for _ in range(ROUNDS):
        folded = optimizer.fold_constants_ir(model, onnx_shape_inference=True, should_fold=should_fold)
        changed = [bool(folded.modified), *(one(model).modified for one in (RewritePass(_RULES), *unused))]
        if not any(changed):
            break
    ir.passes.Sequential(
        passes.RemoveUnusedNodesPass(),
        passes.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        passes.LiftSubgraphInitializersToMainGraphPass(),
        passes.DeduplicateInitializersPass(),
        passes.CommonSubexpressionEliminationPass(),
        passes.OutputFixPass(),
        passes.NameFixPass(),
    )(model)
