"""Names of PyTorch's ops that more than one room must know. Standard library only.

KEPT_OPS and ALTERNATE_MATMULS are what a layer under selective-ops recompute keeps: the rule of torchtitan's
"selective" by "op" of 2024, which keeps fused attention, reduce-scatters of functional collectives, and every
second matmul, from the first one on. FSDP_...: the copies of FSDP2, of shards into the buffer that is
gathered, of what was gathered into parameters, and of gradients into the buffer that is reduced."""

KEPT_OPS = (
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "_c10d_functional::reduce_scatter_tensor",
)
ALTERNATE_MATMULS = ("aten::mm", "aten::addmm")
FSDP_COPY_IN = "fsdp::all_gather_copy_in"
FSDP_COPY_OUT = "fsdp::split_with_sizes_copy"
FSDP_REDUCE_IN = "fsdp::chunk_cat"
