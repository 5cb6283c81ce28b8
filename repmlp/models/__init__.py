"""Networks: RepMLPNet, mixers of timm's, UperNet around a backbone, and how a configuration becomes one of them."""
