"""Settings of the run. See the end of ``revdet/train_net.py --help`` for what they do."""

train = dict(
    output_dir="output/run",
    init_checkpoint="",  # weights to start from, a file or an address
    max_iter=90000,
    seed=0,
    device="auto",  # cuda where there is one
    # What the trunk keeps for the backward pass: store, checkpoint or reversible.
    memory="reversible",
    stored_blocks=0,  # how many of its last blocks store whatever the policy
    amp=dict(enabled=False, dtype="bfloat16"),  # autocast; float16 scales the loss
    clip_grad_norm=0.0,  # 0: no clipping
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=3),
    eval_period=5000,  # 0: at the end only
    log_period=20,
    check_data=True,  # decode every image before training starts
    pictures=8,  # validation images drawn with their predictions at the end
)
