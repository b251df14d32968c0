"""Fused QPILOTS sampling (wip)"""
