"""Mask R-CNN (ResNet-FPN, RPN, ROIAlign, box and mask heads) in torch and torchvision operators, without a cluster."""
