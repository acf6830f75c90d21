# Settings of NCCL and gloo that a cluster may need; jobs source this file. All are off: NCCL chooses
# well by itself, and a setting that was right on one cluster is wrong on the next. Measure with
# doctor.sbatch before and after.

# Which interface the ranks meet through, and gloo (CPU) talks through. Set it where a node has
# several and the first is not the right one: `ip -br address` lists them.
# export NCCL_SOCKET_IFNAME=ib0 GLOO_SOCKET_IFNAME=ib0

# Which InfiniBand or RoCE adapters carry data. `ibstat` lists them; leave storage's out.
# export NCCL_IB_HCA=mlx5_0,mlx5_1,mlx5_2,mlx5_3

# RoCE alone: the GID of RoCE v2, and the traffic class that the switches treat as lossless.
# export NCCL_IB_GID_INDEX=3 NCCL_IB_TC=106

# AWS EFA: its plugin for NCCL must be in the library path; this is for its provider.
# export FI_PROVIDER=efa

# To see what NCCL chose: the first lines of a log, and nothing after.
# export NCCL_DEBUG=INFO NCCL_DEBUG_SUBSYS=INIT,NET

# How long NCCL retries a link that is down before it ends the job (4.096 µs × 2^timeout × retries).
# export NCCL_IB_TIMEOUT=22 NCCL_IB_RETRY_CNT=7
