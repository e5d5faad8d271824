"""Modules that the example scripts import: flags, images, a ResNet for CIFAR, average precision, saved classifiers."""
