//! What a node shows of its experts and links.

use lite_llm_transport::messages::{ExpertPlace, LINKS_VIEWED_MAX, LinkView, NodeView};

use super::NodeState;

impl NodeState {
    /// Where its experts are, how often they were chosen, and what crossed its links.
    pub(super) fn view(&self) -> NodeView {
        let name = self.options.info.name.clone();
        let links = self.options.links.traffic().into_iter().take(LINKS_VIEWED_MAX);
        let link = |(peer, sent, sent_bytes)| LinkView { peer, sent, sent_bytes };
        let links = links.map(link).collect();
        let Some(loads) = self.stats.loads.load_full() else {
            return NodeView { name, links, ..NodeView::default() };
        };
        let counts = loads.read();
        let mut places = vec![ExpertPlace::Elsewhere; counts.len()];
        let store = self.options.store.lock().clone();
        for (key, here) in store.map_or_else(Vec::new, |store| store.places()) {
            if let Some(place) = loads.cell(key).and_then(|cell| places.get_mut(cell)) {
                *place = if here { ExpertPlace::Memory } else { ExpertPlace::Away };
            }
        }
        let (layers, experts) = loads.shape();
        let (layers, experts) = (layers as u32, experts as u32);
        NodeView { name, layers, experts, places, loads: counts, links }
    }
}
