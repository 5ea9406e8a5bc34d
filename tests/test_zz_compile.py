import shutil, torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
pytest_plugins = ["tests.style.fixtures"]
def test_it(run_dsi, tiny_pipeline_dir, tmp_path):
    model = shutil.copytree(tiny_pipeline_dir, tmp_path / "small-unet")
    UNet2DConditionModel(sample_size=16, block_out_channels=(8,), layers_per_block=1, norm_num_groups=4, attention_head_dim=2,
        cross_attention_dim=16, down_block_types=("CrossAttnDownBlock2D",), up_block_types=("CrossAttnUpBlock2D",)).save_pretrained(model / "unet")
    f = dict(pretrained_model_name_or_path=model, use_peft=True, lora_r=2, lora_learning_rate=0.02, validation_steps=1, gradient_checkpointing=False)
    a = run_dsi(output_dir=tmp_path / "plain", **f)
    b = run_dsi(output_dir=tmp_path / "compiled", torch_compile=True, torch_compile_backend="aot_eager", **f)
    print(a["loss_history"], b["loss_history"], a["loss_trained_token"], b["loss_trained_token"])
    x, y = (load_file(tmp_path / n / "pytorch_lora_weights.safetensors") for n in ("plain", "compiled"))
    assert all(torch.allclose(x[k], y[k], atol=1e-4) for k in x)
    assert any(v.abs().max() > 0.01 for k, v in x.items() if "up" in k)
