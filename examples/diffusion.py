"""Diffusion: DoRA on the attention and the convolutions of a diffusers UNet, trained to predict noise.

Takes about 2 min on two CPU cores. Needs peft and diffusers; downloads nothing.
"""

from __future__ import annotations

import torch
from diffusers import DDPMScheduler, UNet2DConditionModel
from peft import LoraConfig, get_peft_model

import dorafx

TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2", "conv_in"]


def main() -> None:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=4,
        out_channels=4,
        block_out_channels=(16,),
        layers_per_block=1,
        norm_num_groups=4,
        cross_attention_dim=32,
        attention_head_dim=4,
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
    )
    unet = get_peft_model(unet, LoraConfig(r=4, use_dora=True, target_modules=TARGETS))
    scheduler = DDPMScheduler()
    clean, prompt = torch.randn(2, 4, 16, 16), torch.randn(2, 7, 32)
    step = torch.tensor([10, 500])

    # A pipeline's is compiled in the same way: pipe.unet = torch.compile(pipe.unet, backend="dorafx")
    compiled = torch.compile(unet, backend="dorafx")
    stock, ours = (model(clean, step, prompt).sample for model in (unet, compiled))
    print(f"outputs differ by {(ours - stock).abs().max().item():.1e}")

    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=1e-3)
    for epoch in range(3):
        noise = torch.randn_like(clean)
        predicted = compiled(scheduler.add_noise(clean, noise, step), step, prompt).sample
        loss = torch.nn.functional.mse_loss(predicted, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"step {epoch + 1}: loss {loss.item():.4f}")
    print(dorafx.rewrite_log())


if __name__ == "__main__":
    main()
