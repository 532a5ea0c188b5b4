"""megatron-core's GPT model, built from the arguments for Megatron-LM. Under torchrun it compares logits.

    python -m torch.distributed.run --nproc-per-node 4 megatron_model.py

compares each Hugging Face folder NAME of the working folder with its checkpoints in NAME-megatron.
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
from recipe.export import megatron
from recipe.training.script import leave
from transformers import AutoConfig, AutoModelForCausalLM

TOKENS = 32
# (tensor, pipeline) parallel ranks; what is left of four ranks is data parallel.
LAYOUTS = ((1, 1), (2, 1), (1, 2), (2, 2))


def their_model(arguments, tensor=1, pipeline=1, stage=0):
    """The model as Megatron-LM builds it from these arguments; of a pipeline, the part of one stage."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.models.gpt.gpt_model import GPTModel
    from megatron.core.transformer import TransformerConfig

    parser = argparse.ArgumentParser(allow_abbrev=False)
    for name, value in arguments.items():
        flag = {"action": "store_true"} if value is None else {"type": type(_number(value))}
        parser.add_argument(name, **flag)
    words = [word for name, value in arguments.items() for word in (name, value) if word is not None]
    given = parser.parse_args(words)
    qk_norm = getattr(given, "qk_layernorm", False)
    swiglu = getattr(given, "swiglu", False)
    config = TransformerConfig(
        num_layers=given.num_layers,
        hidden_size=given.hidden_size,
        ffn_hidden_size=given.ffn_hidden_size,
        num_attention_heads=given.num_attention_heads,
        num_query_groups=getattr(given, "num_query_groups", None),
        kv_channels=given.kv_channels,
        normalization=given.normalization,
        layernorm_epsilon=given.norm_epsilon,
        qk_layernorm=qk_norm,
        gated_linear_unit=swiglu,
        activation_func=torch.nn.functional.silu if swiglu else torch.nn.functional.gelu,
        bias_activation_fusion=not swiglu and not getattr(given, "no_bias_gelu_fusion", False),
        add_bias_linear=not getattr(given, "disable_bias_linear", False),
        attention_dropout=given.attention_dropout,
        hidden_dropout=given.hidden_dropout,
        use_cpu_initialization=True,
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
    )
    return GPTModel(
        config,
        get_gpt_layer_local_spec(qk_layernorm=qk_norm, normalization=given.normalization),
        vocab_size=given.padded_vocab_size,
        max_sequence_length=given.max_position_embeddings,
        pre_process=stage == 0,
        post_process=stage == pipeline - 1,
        parallel_output=False,
        position_embedding_type=given.position_embedding_type,
        rotary_base=getattr(given, "rotary_base", 10000),
        share_embeddings_and_output_weights=not getattr(given, "untie_embeddings_and_output_weights", False),
    )


def _number(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text


def initialize(tensor=1, pipeline=1):
    """Let megatron-core work on a CPU, in the process group that is there."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import initialize_rng_tracker

    parallel_state.initialize_model_parallel(tensor, pipeline)
    initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)


def inputs(vocab_size):
    """Token ids, positions, and where attention is not allowed."""
    ids = torch.randint(vocab_size, (2, TOKENS), generator=torch.Generator().manual_seed(1))
    hidden_from = torch.triu(torch.ones(1, 1, TOKENS, TOKENS, dtype=torch.bool), 1)
    return ids, torch.arange(TOKENS)[None].expand(2, -1), hidden_from


def compare(folder, checkpoint, tensor, pipeline):
    """Print the largest difference of logits, as a share of the largest logit."""
    from megatron.core import parallel_state

    stage = parallel_state.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{parallel_state.get_tensor_model_parallel_rank():02d}"
    name += f"_{stage:03d}" if pipeline > 1 else ""
    config = AutoConfig.from_pretrained(folder)
    arguments = megatron.arguments_for(config, TOKENS, tensor, pipeline)
    model = their_model(arguments, tensor, pipeline, stage).eval()
    state = torch.load(checkpoint / "release" / name / "model_optim_rng.pt", weights_only=True)["model"]
    model.load_state_dict(state, strict=True)
    ids, positions, hidden_from = inputs(config.vocab_size)
    with torch.no_grad():
        if stage > 0:
            hidden = torch.empty(TOKENS, len(ids), config.hidden_size)
            dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
            model.set_input_tensor(hidden)
        found = model(ids, positions, hidden_from)
        if stage < pipeline - 1:
            dist.send(found.contiguous(), parallel_state.get_pipeline_model_parallel_next_rank())
            return
        whole = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
        expected = whole(ids).logits
    difference = (found[..., : config.vocab_size] - expected).abs().max() / expected.abs().max()
    print(f"{folder.name} {checkpoint.name} {float(difference):.1e}\n", end="", flush=True)


def main():
    # Both are called on a CPU, too.
    torch.cuda.current_device = lambda: "cpu"
    torch.Tensor.cuda = lambda tensor: tensor
    dist.init_process_group("gloo")
    from megatron.core import parallel_state

    for tensor, pipeline in LAYOUTS:
        initialize(tensor, pipeline)
        for checkpoint in sorted(Path().glob(f"*-megatron/{tensor}x{pipeline}")):
            folder = Path(checkpoint.parent.name.removesuffix("-megatron"))
            compare(folder, checkpoint, tensor, pipeline)
        dist.barrier()
        parallel_state.destroy_model_parallel()
    leave(0)


if __name__ == "__main__":
    main()
