"""Shapes, peers, harness and report: how segfast is measured."""
