"""Several processes that train one model. The only package that imports torch.distributed."""
