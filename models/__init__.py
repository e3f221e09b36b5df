"""Plain `nn.Module`s, built by small functions with explicit arguments; never touches `torch.distributed`."""
