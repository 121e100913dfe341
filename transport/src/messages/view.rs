//! What a node shows of its experts and links, for people who watch.
//!
//! It is asked only while somebody looks, and decides nothing.

use rkyv::{Archive, Deserialize, Serialize};

use super::MessageError;

/// Most experts of which a node says where they are, over all layers.
pub const EXPERTS_VIEWED_MAX: usize = 1 << 14;
/// Most links that a node lists.
pub const LINKS_VIEWED_MAX: usize = 256;
/// Most bytes of the name at a link's other end.
pub const LINK_NAME_MAX: usize = 1024;

/// Where an expert is, as seen by one node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Archive, Serialize, Deserialize)]
pub enum ExpertPlace {
    /// It is no expert of this node.
    Elsewhere,
    /// It is this node's, and not in its memory at this moment.
    Away,
    /// It is in this node's memory.
    Memory,
}

/// A connection to another node, and what has crossed it since it was made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct LinkView {
    /// The other node.
    pub peer: String,
    /// Messages sent to it.
    pub sent: u64,
    /// Their bytes.
    pub sent_bytes: u64,
}

/// A node's experts and links.
#[derive(Debug, Clone, Default, PartialEq, Eq, Archive, Serialize, Deserialize)]
pub struct NodeView {
    /// The node's name.
    pub name: String,
    /// Sparse layers of which it tells, from the first.
    pub layers: u32,
    /// Experts of each: tiers, then groups, then experts.
    pub experts: u32,
    /// `[layers, experts]`.
    pub places: Vec<ExpertPlace>,
    /// `[layers, experts]`: how many tokens of sequences that are at home there were routed to each,
    /// since its lane began.
    pub loads: Vec<u64>,
    /// Its connections to other nodes, by name.
    pub links: Vec<LinkView>,
}

impl NodeView {
    /// Whether sizes are within bounds and fit each other. To be asked once, on receipt.
    pub fn check(&self) -> Result<(), MessageError> {
        let field = |field, found: usize, expected: String| {
            Err(MessageError::Field { what: "NodeView", field, found: found as u64, expected })
        };
        let cells = u64::from(self.layers) * u64::from(self.experts);
        if cells > EXPERTS_VIEWED_MAX as u64 {
            return field(
                "number of experts",
                cells as usize,
                format!("{EXPERTS_VIEWED_MAX} at most"),
            );
        }
        for (name, found) in
            [("number of places", self.places.len()), ("number of loads", self.loads.len())]
        {
            if found as u64 != cells {
                return field(name, found, format!("{cells}, one for each expert,"));
            }
        }
        if self.links.len() > LINKS_VIEWED_MAX {
            return field(
                "number of links",
                self.links.len(),
                format!("{LINKS_VIEWED_MAX} at most"),
            );
        }
        match self.links.iter().map(|link| link.peer.len()).max().unwrap_or(0) {
            0..=LINK_NAME_MAX => Ok(()),
            longest => field("length of a name", longest, format!("{LINK_NAME_MAX} at most")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_that_do_not_fit_are_refused() {
        let good = NodeView {
            name: "a".into(),
            layers: 2,
            experts: 1,
            places: vec![ExpertPlace::Memory, ExpertPlace::Away],
            loads: vec![1, 2],
            links: vec![LinkView::default()],
        };
        good.check().unwrap();
        let bad = [
            NodeView { layers: 3, ..good.clone() },
            NodeView { loads: vec![1], ..good.clone() },
            NodeView { places: Vec::new(), ..good.clone() },
            NodeView { layers: u32::MAX, experts: u32::MAX, ..good.clone() },
            NodeView { links: vec![LinkView::default(); LINKS_VIEWED_MAX + 1], ..good.clone() },
            NodeView {
                links: vec![LinkView {
                    peer: "x".repeat(LINK_NAME_MAX + 1),
                    ..LinkView::default()
                }],
                ..good
            },
        ];
        for view in bad {
            view.check().unwrap_err();
        }
    }
}
